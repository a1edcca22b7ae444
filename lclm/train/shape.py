"""The model a run trains, from the one it starts from: rope, sparse layers, sinks."""

import dataclasses

import jax.numpy as jnp

from lclm.attention import for_length
from lclm.blocks.attention import layer_mask
from lclm.config import AttentionSpec, LayerSpec, ModelConfig, Run
from lclm.errors import LclmError
from lclm.models.convert import convert
from lclm.models.decoder import untied
from lclm.models.extend import map_attention, with_rope
from lclm.models.hybrid_presets import infini_params
from lclm.specs import InfiniSpec
from lclm.train.config import ModelSpec
from lclm.typing import Params


def reshaped(config: ModelConfig, spec: ModelSpec) -> ModelConfig:
    """The model as it will be stored and used after the run.

    Raises LclmError where the run's rope, hybrid or sink does not suit the model.
    """
    if spec.hybrid is not None:
        config = convert(config, spec.hybrid)
    if spec.rope is not None:
        config = with_rope(config, spec.rope)
    if spec.sink is not None:
        changed = map_attention(config, _sink)
        if changed == config and not any(_has_sink(s) for s in config.layers):
            raise LclmError(f"model.sink={spec.sink!r}: the model has no attention")
        config = changed
    if spec.head == "frozen":
        config = dataclasses.replace(config, tied=False)
    return config


def training_config(config: ModelConfig, spec: ModelSpec, length: int) -> ModelConfig:
    """The model as it is trained on rows of `length`: reshaped, pattern of training."""
    config = reshaped(config, spec)
    if spec.pattern is not None:
        config = _with_pattern(config, spec.pattern, length)
    if spec.laid is not None:
        laid = spec.laid
        config = map_attention(config, lambda m: dataclasses.replace(m, laid=laid))
    return config


def fitted(config: ModelConfig, params: Params) -> Params:
    """Per-layer parameters of the model before `reshaped`, with what it adds.

    An untied head begins as a copy of the embedding, sinks and memory gates at 0.
    """
    out = dict(params)
    layers = config.layers
    if any(
        isinstance(s.mixer, InfiniSpec) and "attn" in out[f"layers_{i}"]
        for i, s in enumerate(layers)
    ):
        out = infini_params(config, out)
    for i, spec in enumerate(layers):
        block = out[f"layers_{i}"]
        if _has_sink(spec) and "sink" not in block["attn"]:
            sink = {"sink": jnp.zeros(spec.mixer.heads, jnp.float32)}
            out[f"layers_{i}"] = block | {"attn": block["attn"] | sink}
    if not config.tied and "head" not in out:
        out = untied(out)
    return out


def _with_pattern(config: ModelConfig, pattern: str, length: int) -> ModelConfig:
    """The pattern of training in every layer of full attention."""
    filled = for_length(pattern, length)

    def change(mixer: AttentionSpec) -> AttentionSpec:
        if mixer.window is not None or mixer.static:
            return mixer
        return dataclasses.replace(mixer, pattern=filled, laid="rows")

    def layer(spec: LayerSpec) -> LayerSpec:
        if not isinstance(spec.mixer, AttentionSpec):
            return spec
        return dataclasses.replace(spec, mixer=change(spec.mixer))

    stack = tuple(Run(tuple(map(layer, r.group)), r.repeats) for r in config.stack)
    changed = dataclasses.replace(config, stack=stack)
    if changed == config:
        raise LclmError(
            f"model.pattern {pattern!r}: the model has no layer of full attention"
        )
    for spec in changed.layers:
        if isinstance(spec.mixer, AttentionSpec):
            layer_mask(spec.mixer)
    return changed


def _has_sink(spec: LayerSpec) -> bool:
    return isinstance(spec.mixer, AttentionSpec) and spec.mixer.sink


def _sink(mixer: AttentionSpec) -> AttentionSpec:
    return dataclasses.replace(mixer, sink=True)
