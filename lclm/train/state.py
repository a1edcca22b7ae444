"""What a step changes and what it only reads, both flat and keyed by path."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lclm.config import ModelConfig
from lclm.errors import LclmError
from lclm.models.decoder import stack_params, unstack_params
from lclm.models.lora import adapters, attach, merge
from lclm.objectives.base import Objective
from lclm.ops.int8 import Int8Weight
from lclm.ops.packed import PackedWeight
from lclm.train.config import ModelSpec, TrainConfig
from lclm.train.shape import fitted, reshaped, training_config
from lclm.tree import flatten, nest
from lclm.typing import Array, Leaf, Params

OWN = "objective/"
PACKED = (PackedWeight, Int8Weight)

__all__ = [
    "OWN",
    "TrainState",
    "count",
    "final_params",
    "is_finite",
    "model_params",
    "own_params",
    "reshaped",
    "start",
    "training_config",
    "zeros_like",
]


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


def start(
    run: TrainConfig,
    config: ModelConfig,
    params: Params,
    objective: Objective,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, Params]:
    """The state before the first step, and the parameters that stay as they are.

    `params` are those of the model the run starts from, per layer; trained ones are
    copied, so that a step may write over them; packed ones stay packed, and are frozen.
    Raises LclmError where `trains` matches nothing, or what cannot be trained.
    """
    key = jax.random.key(run.seed)
    dtype = jnp.dtype(run.model.dtype)
    tree = fitted(config, params)
    tree = _stacked(config, tree) if run.scan else tree
    flat = {p: _stored(leaf, dtype) for p, leaf in flatten(tree).items()}
    extra = {OWN + p: v for p, v in objective.init(config, key).items()}
    if run.model.lora is not None:
        extra |= adapters(flat, run.model.lora, jax.random.fold_in(key, 1))
    trained = set(extra) | set(_chosen(run.model, flat, bool(extra)))
    if extra or run.model.trains:
        _check_tied(run.model, config, trained)
    flat |= extra
    own = {p: jnp.array(v, copy=True) for p, v in flat.items() if p in trained}
    frozen = {p: v for p, v in flat.items() if p not in trained}
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, skipped, own, tx.init(own)), frozen


def _stored(leaf: Any, dtype: Any) -> Any:
    return leaf if isinstance(leaf, PACKED) else jnp.asarray(leaf, dtype)


def _stacked(config: ModelConfig, params: Params) -> Params:
    try:
        return stack_params(config, params)
    except ValueError as error:
        raise LclmError(
            "the layers' weights are stored in forms that differ from layer to layer "
            f"({error}): set scan=False"
        ) from None


def _check_tied(spec: ModelSpec, config: ModelConfig, trained: set[str]) -> None:
    if config.tied and "embed/table" in trained and spec.head is None:
        raise LclmError(
            "trains matches embed/table, which is the output matrix too (the model is "
            "tied): set model.head='trained' to train both as one, or 'frozen' for an "
            "output matrix of its own that stays as it is"
        )


def _chosen(spec: ModelSpec, flat: Params, extra: bool) -> list[str]:
    """Paths of the model's own parameters that are trained."""
    paths = _matching(spec, flat, extra)
    if spec.sink == "zero":
        paths = [p for p in paths if not p.endswith("attn/sink")]
    for path in paths:
        if isinstance(flat[path], PACKED):
            raise LclmError(
                f"{path} is packed and cannot be trained: train adapters on it "
                "(model.lora), or load the model dense"
            )
    return paths


def _matching(spec: ModelSpec, flat: Params, extra: bool) -> list[str]:
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


def trained_params(run: TrainConfig, config: ModelConfig, trained: Params) -> Params:
    """Trained parameters alone, flat and per layer, adapters as they are."""
    tree = nest({p: v for p, v in trained.items() if not p.startswith(OWN)})
    if not run.scan:
        return flatten(tree)
    for r, part in enumerate(config.stack):
        blocks = tree.setdefault(f"run_{r}", {})
        for j in range(len(part.group)):
            blocks.setdefault(f"block_{j}", {})
    return flatten(unstack_params(config, tree))


def count(params: Params) -> int:
    """Numbers in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def zeros_like(params: Params) -> Params:
    """float32 sums to add gradients into."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def is_finite(*values: Array) -> Array:
    """Whether all of them are."""
    return jnp.all(jnp.stack([jnp.isfinite(v) for v in values]))
