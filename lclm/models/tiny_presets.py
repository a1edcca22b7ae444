"""Small models over bytes: for smoke runs, tests of recipes, and a first look.

`tiny-bytes` have 0.8M parameters and more, `mini-bytes` 0.2M to 0.4M: one architecture
each, about the same FLOPs a byte.
"""

from collections.abc import Callable

from lclm.config import (
    RMS,
    AttentionSpec,
    LayerNormSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
    Run,
    TimestepNormSpec,
)
from lclm.models.jamba_presets import JAMBA_NORM, jamba_stack
from lclm.specs import FfnSpec, MambaSpec, MegalodonSpec, MoeSpec

# Of lclm.hub.tokenizer.ByteTokenizer: 256 bytes, then BOS, EOS, PAD.
VOCAB, BOS, EOS = 259, 256, 257
TINY, MINI = 128, 64
CONTEXT, MINI_CONTEXT = 1024, 256


def _bytes(
    family: str,
    *stack: Run,
    width: int = TINY,
    context: int = CONTEXT,
    norm: NormSpec | TimestepNormSpec = RMS,
) -> ModelConfig:
    return ModelConfig(family, VOCAB, width, stack, context, norm, bos=BOS, eos=(EOS,))


def _mini(
    family: str, *stack: Run, norm: NormSpec | TimestepNormSpec = RMS
) -> ModelConfig:
    return _bytes(family, *stack, width=MINI, context=MINI_CONTEXT, norm=norm)


def _attention() -> LayerSpec:
    spec = AttentionSpec(4, 2, 32, RopeSpec(context=CONTEXT))
    return LayerSpec(spec, MlpSpec(384))


def _mini_attention() -> LayerSpec:
    spec = AttentionSpec(4, 2, 16, RopeSpec(context=MINI_CONTEXT))
    return LayerSpec(spec, MlpSpec(192))


def _mamba() -> LayerSpec:
    return LayerSpec(MambaSpec(256, 8), MlpSpec(384))


def _mini_jamba() -> ModelConfig:
    """One layer in four is attention, without positions; every second has experts."""
    mamba = MambaSpec(2 * MINI, 4, inner_norms=True)
    stack = jamba_stack(
        4,
        (mamba, AttentionSpec(4, 2, 16, rope=None)),
        (MlpSpec(128), MoeSpec(128, 4)),
        attention_every=(4, 2),
        experts_every=(2, 1),
    )
    return _mini("jamba", *stack, norm=JAMBA_NORM)


def _mini_megalodon() -> ModelConfig:
    mixer = MegalodonSpec(heads=1, z=32, value=128, chunk=128, norm_groups=4)
    layer = LayerSpec(mixer, FfnSpec(192), LayerNormSpec(), wiring="twohop")
    return _mini("megalodon", Run((layer,), 4), norm=TimestepNormSpec(4))


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny-bytes": lambda: _bytes("llama", Run((_attention(),), 4)),
    "tiny-bytes-hybrid": lambda: _bytes("hybrid", Run((_mamba(), _attention()), 2)),
    "mini-bytes": lambda: _mini("llama", Run((_mini_attention(),), 4)),
    "mini-bytes-deep": lambda: _mini("llama", Run((_mini_attention(),), 6)),
    "mini-bytes-mamba": lambda: _mini(
        "mamba", Run((LayerSpec(MambaSpec(2 * MINI, 4), None),), 8)
    ),
    "mini-bytes-jamba": _mini_jamba,
    "mini-bytes-megalodon": _mini_megalodon,
}
