"""Llama-type models with long-context layers: LongGen and Infini-attention."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax.numpy as jnp

from lclm.config import LayerSpec, ModelConfig, find_runs
from lclm.errors import LclmError, unknown
from lclm.specs import AttentionSpec, InfiniSpec
from lclm.typing import Params

BASES = ("llama-2-7b", "llama-3-8b", "smollm2-135m")
CONTEXT = 131072
# LongGen raises the base and does not say to what; this is ours.
THETA = 5e6
SINKS, WINDOW = 64, 1984
PLACES = ("middle", "bottom", "top", "spread")
BLOCKS = "block_sparse:block=64,local=16,stride=128,kv_heads={kv_heads}"


def longgen(
    base: ModelConfig,
    *,
    full: int | None = None,
    place: str = "middle",
    blocks: bool = False,
    context: int = CONTEXT,
    theta: float = THETA,
) -> ModelConfig:
    """LongGen (arXiv 2410.01485): full attention in the middle, sparse layers around.

    About 2048 tokens of 128k are seen by a sparse layer: sinks and a window, or
    (`blocks`) near blocks and stripes. `full` layers, by default the third that gives
    12 of 32, see everything; `place` is one of `PLACES`. Raises LclmError where they do
    not fit.
    """
    layers = [_attention(layer, "LongGen") for layer in base.layers]
    whole = full_layers(len(layers), full, place)

    def one(index: int, layer: LayerSpec) -> LayerSpec:
        spec = layer.mixer
        rope = dataclasses.replace(spec.rope, theta=theta, context=context)
        spec = dataclasses.replace(spec, rope=rope)
        if index in whole:
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


def full_layers(depth: int, full: int | None, place: str) -> tuple[int, ...]:
    """Indices of the `full` layers of `depth` that see everything.

    "bottom" is next to the embedding, "spread" at even distances. Raises LclmError for
    a number that does not fit.
    """
    if place not in PLACES:
        raise unknown("place of LongGen's full layers", place, PLACES)
    full = 2 * -(-depth // 6) if full is None else full
    fits = 0 <= full <= depth
    if place == "middle" and (not fits or (depth - full) % 2):
        raise LclmError(
            f"LongGen with {full} full layers of {depth}: the rest must halve around "
            f"the middle; use a number such as {depth - 2 * (depth // 3)}"
        )
    if not fits:
        raise LclmError(f"LongGen with {full} full layers of {depth}: 0 to {depth}")
    if place == "spread":
        return tuple((2 * i + 1) * depth // (2 * full) for i in range(full))
    first = {"bottom": 0, "middle": (depth - full) // 2, "top": depth - full}[place]
    return tuple(range(first, first + full))


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
