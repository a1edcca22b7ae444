"""Llama-type models with long-context layers: LongGen and Infini-attention."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax.numpy as jnp

from lclm.config import LayerSpec, ModelConfig, find_runs
from lclm.errors import LclmError
from lclm.specs import AttentionSpec, InfiniSpec
from lclm.typing import Params

BASES = ("llama-2-7b", "llama-3-8b", "smollm2-135m")
CONTEXT = 131072
# LongGen raises the base and does not say to what; this is ours.
THETA = 5e6
SINKS, WINDOW = 64, 1984
BLOCKS = "block_sparse:block=64,local=16,stride=128,kv_heads={kv_heads}"


def longgen(
    base: ModelConfig,
    *,
    full: int | None = None,
    blocks: bool = False,
    context: int = CONTEXT,
    theta: float = THETA,
) -> ModelConfig:
    """LongGen (arXiv 2410.01485): full attention in the middle, sparse layers around.

    About 2048 tokens of 128k are seen by a sparse layer: sinks and a window, or
    (`blocks`) near blocks and stripes. `full` layers in the middle, by default the
    third that gives 12 of 32, see everything. Raises LclmError where they do not fit.
    """
    layers = [_attention(layer, "LongGen") for layer in base.layers]
    depth = len(layers)
    full = 2 * -(-depth // 6) if full is None else full
    if not 0 <= full <= depth or (depth - full) % 2:
        raise LclmError(
            f"LongGen with {full} full layers of {depth}: the rest must halve around "
            f"the middle; use a number such as {depth - 2 * (depth // 3)}"
        )
    edge = (depth - full) // 2

    def one(index: int, layer: LayerSpec) -> LayerSpec:
        spec = layer.mixer
        rope = dataclasses.replace(spec.rope, theta=theta, context=context)
        spec = dataclasses.replace(spec, rope=rope)
        if edge <= index < depth - edge:
            pass
        elif blocks:
            spec = dataclasses.replace(
                spec, pattern=BLOCKS.format(kv_heads=spec.kv_heads)
            )
        else:
            spec = dataclasses.replace(spec, sinks=SINKS, window=WINDOW)
        return dataclasses.replace(layer, mixer=spec)

    new = tuple(one(i, layer) for i, layer in enumerate(layers))
    return dataclasses.replace(
        base, family="longgen", stack=find_runs(new), context=context
    )


def infini(
    base: ModelConfig,
    *,
    segment: int = 2048,
    rule: str = "delta",
    gate: float = 0.0,
    context: int = CONTEXT,
) -> ModelConfig:
    """Every attention layer with a compressive memory (arXiv 2404.07143)."""

    def one(layer: LayerSpec) -> LayerSpec:
        spec = InfiniSpec(_attention(layer, "Infini-attention").mixer, segment, rule)
        return dataclasses.replace(layer, mixer=dataclasses.replace(spec, gate=gate))

    return dataclasses.replace(
        base,
        family="infini",
        stack=find_runs(tuple(map(one, base.layers))),
        context=context,
    )


def infini_params(config: ModelConfig, params: Params) -> Params:
    """A base model's parameters with the gates that `infini(base)` adds.

    Until a text is longer than one segment the model computes what the base does.
    """
    out = dict(params)
    for i, layer in enumerate(config.layers):
        block = dict(out[f"layers_{i}"])
        spec = layer.mixer
        gate = jnp.full(spec.attention.heads, spec.gate, jnp.float32)
        block["infini"] = dict(block.pop("attn")) | {"gate": gate}
        out[f"layers_{i}"] = block
    return out


def over(bases: Mapping[str, Callable[[], ModelConfig]]) -> dict[str, Callable]:
    """The presets of this file over those that publish the shapes."""

    def made(change: Callable, name: str, **options: bool) -> Callable:
        return lambda: functools.partial(change, **options)(bases[name]())

    return {
        **{f"longgen-{name}": made(longgen, name) for name in BASES},
        **{
            f"longgen-{name}-blocks": made(longgen, name, blocks=True) for name in BASES
        },
        **{f"infini-{name}": made(infini, name) for name in BASES},
    }


def _attention(layer: LayerSpec, method: str) -> LayerSpec:
    """The layer, if it is full attention with RoPE."""
    spec = layer.mixer
    plain = isinstance(spec, AttentionSpec) and spec.window is None and not spec.static
    if not plain or spec.rope is None:
        raise LclmError(
            f"{method} over a layer with mixer {spec}: it starts from layers of full "
            "attention with RoPE"
        )
    return layer
