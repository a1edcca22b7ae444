"""Mixtures of experts as data: Jamba (arXiv 2403.19887, 2408.12570) and Mixtral.

Jamba mixes by attention every few layers and by Mamba otherwise; every few layers its
feed-forward is a mixture of experts.
"""

import math
from collections.abc import Sequence

from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
    Run,
    find_runs,
)
from lclm.errors import LclmError
from lclm.specs import FeedForward, MambaSpec, Mixer, MoeSpec

ATTENTION_EVERY = (8, 4)
EXPERTS_EVERY = (2, 1)
JAMBA_NORM = NormSpec(1e-6)
JAMBA_CONTEXT = 262144
JAMBA_VOCAB = 65536


def every(depth: int, period: int, offset: int, *, what: str) -> tuple[bool, ...]:
    """Which of `depth` layers have index % period == offset.

    Raises `LclmError` for a period below 1 or an offset outside 0..period-1.
    """
    if period < 1:
        raise LclmError(f"{what} layer period is {period}; it must be at least 1")
    if not 0 <= offset < period:
        raise LclmError(
            f"{what} layer offset is {offset} with a period of {period}: an offset is "
            f"0 to {period - 1}"
        )
    return tuple(i % period == offset for i in range(depth))


def jamba_layers(
    mixers: Sequence[Mixer],
    mlps: Sequence[FeedForward],
    *,
    attention: Sequence[bool],
    experts: Sequence[bool],
    norm: NormSpec = JAMBA_NORM,
) -> tuple[LayerSpec, ...]:
    """One layer per place: `mixers` is (Mamba, attention), `mlps` (dense, experts)."""
    return tuple(
        LayerSpec(mixers[a], mlps[e], norm)
        for a, e in zip(attention, experts, strict=True)
    )


def jamba_stack(
    depth: int,
    mixers: Sequence[Mixer],
    mlps: Sequence[FeedForward],
    *,
    attention_every: tuple[int, int] = ATTENTION_EVERY,
    experts_every: tuple[int, int] = EXPERTS_EVERY,
    norm: NormSpec = JAMBA_NORM,
) -> tuple[Run, ...]:
    """A stack of whole periods, from (period, offset) of attention and of experts.

    Raises `LclmError` for an offset out of range, and where the layers are not a whole
    number of common periods: such a stack is not one scan.
    """
    layers = jamba_layers(
        mixers,
        mlps,
        attention=every(depth, *attention_every, what="attention"),
        experts=every(depth, *experts_every, what="expert"),
        norm=norm,
    )
    period = math.lcm(attention_every[0], experts_every[0])
    if depth % period:
        raise LclmError(
            f"{depth} layers do not divide into periods of {period} (attention every "
            f"{attention_every[0]}, experts every {experts_every[0]}): use a multiple "
            f"of {period} layers, or other periods"
        )
    return find_runs(layers, max(period, 8))


def jamba(
    width: int,
    mlp: int,
    depth: int,
    heads: int,
    *,
    kv_heads: int = 8,
    experts: int = 16,
    eos: tuple[int, ...] = (2,),
) -> ModelConfig:
    """A model of Jamba's published shape: 1 attention in 8 layers, experts in 1 of 2.

    The Mamba half is twice as wide as the model, its step sizes of rank width / 16.
    """
    mamba = MambaSpec(
        inner=2 * width,
        rank=math.ceil(width / 16),
        inner_norms=True,
        norm_eps=JAMBA_NORM.eps,
    )
    attention = AttentionSpec(heads, kv_heads, width // heads, rope=None)
    stack = jamba_stack(
        depth, (mamba, attention), (MlpSpec(mlp), MoeSpec(mlp, experts))
    )
    return ModelConfig(
        "jamba",
        JAMBA_VOCAB,
        width,
        stack,
        JAMBA_CONTEXT,
        JAMBA_NORM,
        tied=False,
        bos=1,
        eos=eos,
    )


def _mixtral_8x7b() -> ModelConfig:
    rope = RopeSpec(theta=1e6, context=32768)
    layer = LayerSpec(
        AttentionSpec(32, 8, 128, rope), MoeSpec(14336, 8, renormalise=True)
    )
    return ModelConfig(
        "mixtral",
        32000,
        4096,
        (Run((layer,), 32),),
        rope.context,
        tied=False,
        bos=1,
        eos=(2,),
    )


PRESETS = {
    "jamba-v0.1": lambda: jamba(4096, 14336, 32, 32),
    "jamba-1.5-mini": lambda: jamba(4096, 14336, 32, 32, eos=(2, 518)),
    "jamba-1.5-large": lambda: jamba(8192, 24576, 72, 64, eos=(2, 518)),
    "mixtral-8x7b": _mixtral_8x7b,
}
