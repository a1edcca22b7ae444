"""What a step changes and what it only reads, both flat and keyed by path."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lclm.attention import for_length
from lclm.blocks.attention import layer_mask
from lclm.config import AttentionSpec, LayerSpec, ModelConfig, Run
from lclm.errors import LclmError
from lclm.models.decoder import stack_params, unstack_params
from lclm.models.lora import adapters, attach, merge
from lclm.objectives.base import Objective
from lclm.train.config import ModelSpec, TrainConfig
from lclm.tree import flatten, nest
from lclm.typing import Array, Leaf, Params

OWN = "objective/"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes.

    step: batches read; skipped: those whose loss or gradient was not finite; params:
    the trained ones, by path, which alone have optimizer state.
    """

    step: Leaf
    skipped: Leaf
    params: Params
    opt: Any


def training_config(config: ModelConfig, spec: ModelSpec, length: int) -> ModelConfig:
    """The model as it is trained on rows of `length`: reshaped, pattern of training."""
    config = reshaped(config, spec)
    if spec.pattern is not None:
        config = _with_pattern(config, spec, length)
    if spec.laid is not None:
        laid = spec.laid
        config = _map_attention(config, lambda m: dataclasses.replace(m, laid=laid))
    return config


def reshaped(config: ModelConfig, spec: ModelSpec) -> ModelConfig:
    """The model as it will be used: with the run's rotary embedding and context."""
    if spec.rope is None:
        return config
    told = {k: v for k, v in dataclasses.asdict(spec.rope).items() if v is not None}

    def change(mixer: AttentionSpec) -> AttentionSpec:
        if mixer.rope is None:
            return mixer
        return dataclasses.replace(mixer, rope=dataclasses.replace(mixer.rope, **told))

    context = told.get("context", config.context)
    return dataclasses.replace(_map_attention(config, change), context=context)


def _with_pattern(config: ModelConfig, spec: ModelSpec, length: int) -> ModelConfig:
    """The pattern of training in every layer of full attention."""
    assert spec.pattern is not None
    pattern = for_length(spec.pattern, length)

    def change(mixer: AttentionSpec) -> AttentionSpec:
        if mixer.window is not None or mixer.static:
            return mixer
        return dataclasses.replace(mixer, pattern=pattern, laid="rows")

    changed = _map_attention(config, change)
    if changed == config:
        raise LclmError(
            f"model.pattern {spec.pattern!r}: the model has no layer of full attention"
        )
    for layer in changed.layers:
        if isinstance(layer.mixer, AttentionSpec):
            layer_mask(layer.mixer)
    return changed


def _map_attention(config: ModelConfig, change) -> ModelConfig:
    def layer(spec: LayerSpec) -> LayerSpec:
        if not isinstance(spec.mixer, AttentionSpec):
            return spec
        return dataclasses.replace(spec, mixer=change(spec.mixer))

    stack = tuple(
        Run(tuple(layer(s) for s in run.group), run.repeats) for run in config.stack
    )
    return dataclasses.replace(config, stack=stack)


def start(
    run: TrainConfig,
    config: ModelConfig,
    params: Params,
    objective: Objective,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, Params]:
    """The state before the first step, and the parameters that stay as they are.

    `params` are the model's, per layer; trained ones are copied, so that a step may
    write over them. Raises LclmError where `trains` matches nothing.
    """
    key = jax.random.key(run.seed)
    dtype = jnp.dtype(run.model.dtype)
    tree = stack_params(config, params) if run.scan else params
    flat = {p: jnp.asarray(leaf, dtype) for p, leaf in flatten(tree).items()}
    extra = {OWN + p: v for p, v in objective.init(config, key).items()}
    if run.model.lora is not None:
        extra |= adapters(flat, run.model.lora, jax.random.fold_in(key, 1))
    trained = set(extra) | set(_chosen(run.model, flat, bool(extra)))
    flat |= extra
    own = {p: jnp.array(v, copy=True) for p, v in flat.items() if p in trained}
    frozen = {p: v for p, v in flat.items() if p not in trained}
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, skipped, own, tx.init(own)), frozen


def _chosen(spec: ModelSpec, flat: Params, extra: bool) -> list[str]:
    if not spec.trains:
        return [] if extra else list(flat)
    for pattern in spec.trains:
        if not any(re.search(pattern, path) for path in flat):
            raise LclmError(
                f"trains: {pattern!r} matches no parameter; paths look like "
                f"{', '.join(list(flat)[:3])}"
            )
    return [p for p in flat if any(re.search(t, p) for t in spec.trains)]


def model_params(run: TrainConfig, flat: Params) -> Params:
    """The nested tree a decoder applies, adapters attached, from flat parameters."""
    kept = {p: v for p, v in flat.items() if not p.startswith(OWN)}
    return nest(attach(kept, run.model.lora))


def own_params(flat: Params) -> Params:
    """The objective's parameters, without their prefix."""
    return {p.removeprefix(OWN): v for p, v in flat.items() if p.startswith(OWN)}


def final_params(run: TrainConfig, config: ModelConfig, flat: Params) -> Params:
    """Per-layer parameters of the trained model, adapters merged."""
    flat = {p: v for p, v in flat.items() if not p.startswith(OWN)}
    tree = nest(merge(flat, run.model.lora))
    return unstack_params(config, tree) if run.scan else tree


def count(params: Params) -> int:
    """Numbers in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def zeros_like(params: Params) -> Params:
    """float32 sums to add gradients into."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def is_finite(*values: Array) -> Array:
    """Whether all of them are."""
    return jnp.all(jnp.stack([jnp.isfinite(v) for v in values]))
