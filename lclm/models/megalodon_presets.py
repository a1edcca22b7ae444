"""Megalodon as released (arXiv 2404.08801): shapes only, no weights were published."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from lclm.config import LayerNormSpec, LayerSpec, ModelConfig, Run, TimestepNormSpec
from lclm.specs import FfnSpec, MegalodonSpec

EPS = 1e-5
CONTEXT = 32768  # what the paper trains with


@dataclass(frozen=True)
class Size:
    """One row of the released table; `pg19` scales and ties the embeddings."""

    depth: int
    width: int
    heads: int
    ffn: int
    groups: int = 64
    gated: bool = False
    pg19: bool = False
    chunk: int = 2048
    theta: float = 10000.0


SIZES = {
    "megalodon-200m": Size(12, 1024, 1, 2560, 32),
    "megalodon-1.3b": Size(24, 2048, 2, 4864),
    "megalodon-1.3b-pg19": Size(24, 2048, 2, 3584, gated=True, pg19=True),
    "megalodon-7.1b": Size(32, 4096, 4, 11264),
    "megalodon-7.3b": Size(32, 4096, 4, 8192, gated=True),
    "megalodon-7b": Size(32, 4096, 4, 8192, gated=True, chunk=4096, theta=1e5),
}


def megalodon(
    width: int,
    depth: int,
    mixer: MegalodonSpec,
    ffn: FfnSpec,
    *,
    vocab: int = 32000,
    tied: bool = False,
    scaled: bool = False,
) -> ModelConfig:
    """A Megalodon of `depth` equal layers, embeddings times sqrt(width) if `scaled`."""
    layer = LayerSpec(mixer, ffn, LayerNormSpec(mixer.eps), wiring="twohop")
    return ModelConfig(
        family="megalodon",
        vocab=vocab,
        width=width,
        stack=(Run((layer,), depth),),
        context=CONTEXT,
        norm=TimestepNormSpec(mixer.norm_groups, mixer.eps),
        tied=tied,
        embed_scale=math.sqrt(width) if scaled else None,
        bos=1,
        eos=(2,),
    )


def _preset(size: Size) -> ModelConfig:
    mixer = MegalodonSpec(
        heads=size.heads,
        z=256 * size.heads,
        value=2 * size.width,
        chunk=size.chunk,
        norm_groups=size.groups,
        theta=size.theta,
        eps=EPS,
    )
    ffn = FfnSpec(size.ffn, gated=size.gated)
    return megalodon(
        size.width, size.depth, mixer, ffn, tied=size.pg19, scaled=size.pg19
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    name: functools.partial(_preset, size) for name, size in SIZES.items()
}
