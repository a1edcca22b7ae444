"""Pretrained models given long-context layers: `longgen:sinks=64,window=1984`."""

import dataclasses
from collections.abc import Callable

from lclm.config import LayerSpec, ModelConfig, find_runs
from lclm.errors import LclmError
from lclm.models import hybrid_presets
from lclm.registry import Entry, Table
from lclm.shorthand import build
from lclm.specs import AttentionSpec

Convert = Callable[[ModelConfig], ModelConfig]

HYBRIDS = Table(
    "hybrid",
    {
        "longgen": Entry(
            "lclm.models.convert:longgen",
            "full attention in the middle third, sinks and a window elsewhere",
        ),
        "longgen_blocks": Entry(
            "lclm.models.convert:longgen_blocks",
            "full attention in the middle third, block-sparse elsewhere",
        ),
        "infini": Entry(
            "lclm.models.convert:infini", "a compressive memory in every layer"
        ),
    },
)


def convert(config: ModelConfig, hybrid: str) -> ModelConfig:
    """The model with the layers of `hybrid`; its rotary embedding stays as it is."""
    return build(HYBRIDS, hybrid, "longgen:window=1984")(config)


def longgen(
    full: int | None = None,
    sinks: int = hybrid_presets.SINKS,
    window: int = hybrid_presets.WINDOW,
    place: str = "middle",
) -> Convert:
    """LongGen's AttnSink form (arXiv 2410.01485).

    `full` layers see everything: in the "middle", at the "bottom" (next to the
    embedding) or the "top", or "spread".
    """
    return _longgen(full, place, window=window, sinks=sinks)


def longgen_blocks(
    full: int | None = None,
    block: int = 64,
    local: int = 16,
    stride: int = 128,
    place: str = "middle",
) -> Convert:
    """LongGen's BlockSparse form; kv heads see stripes of their own."""
    sizes = f"block={block},local={local},stride={stride}"
    return _longgen(full, place, pattern=f"block_sparse:{sizes}")


def infini(segment: int = 2048, rule: str = "delta") -> Convert:
    """Infini-attention (arXiv 2404.07143) in every layer."""
    return lambda config: hybrid_presets.infini(
        config, segment=segment, rule=rule, context=config.context
    )


def _longgen(full: int | None, place: str, **sparse: int | str) -> Convert:
    def change(config: ModelConfig) -> ModelConfig:
        plain = hybrid_presets.longgen(config, full=full, place=place, blocks=True)
        layers = tuple(
            _thin(old, sparse) if new.mixer.static else old
            for old, new in zip(config.layers, plain.layers, strict=True)
        )
        return dataclasses.replace(config, family="longgen", stack=find_runs(layers))

    return change


def _thin(layer: LayerSpec, sparse: dict[str, int | str]) -> LayerSpec:
    """The layer with a sparse mask in place of full attention."""
    spec = layer.mixer
    if not isinstance(spec, AttentionSpec):
        raise LclmError(f"LongGen over a layer with mixer {spec}: full attention only")
    if "pattern" in sparse:
        pattern = f"{sparse['pattern']},kv_heads={spec.kv_heads}"
        return dataclasses.replace(
            layer, mixer=dataclasses.replace(spec, pattern=pattern)
        )
    return dataclasses.replace(layer, mixer=dataclasses.replace(spec, **sparse))
