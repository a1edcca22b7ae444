"""Published models as data: the shapes of their Hugging Face configurations."""

from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
    Run,
)
from lclm.errors import unknown
from lclm.models import (
    hybrid_presets,
    jamba_presets,
    mamba2_presets,
    mamba_presets,
    megalodon_presets,
    tiny_presets,
)

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192}


def _uniform(
    family: str,
    vocab: int,
    width: int,
    mlp: int,
    depth: int,
    attention: AttentionSpec,
    *,
    eps: float = 1e-5,
    tied: bool = False,
    bos: int | None = 1,
    eos: tuple[int, ...] = (2,),
) -> ModelConfig:
    norm = NormSpec(eps)
    layer = LayerSpec(attention, MlpSpec(mlp), norm)
    context = attention.rope.context
    return ModelConfig(
        family,
        vocab,
        width,
        (Run((layer,), depth),),
        context,
        norm,
        tied,
        bos=bos,
        eos=eos,
    )


def _smollm2_135m() -> ModelConfig:
    rope = RopeSpec(theta=1e5, context=8192)
    spec = AttentionSpec(9, 3, 64, rope)
    return _uniform("llama", 49152, 576, 1536, 30, spec, tied=True)


def _llama2_7b() -> ModelConfig:
    spec = AttentionSpec(32, 32, 128, RopeSpec(context=4096))
    return _uniform("llama", 32000, 4096, 11008, 32, spec)


def _llama3_8b() -> ModelConfig:
    spec = AttentionSpec(32, 8, 128, RopeSpec(theta=5e5, context=8192))
    return _uniform("llama", 128256, 4096, 14336, 32, spec, bos=128000, eos=(128001,))


def _llama31_8b() -> ModelConfig:
    rope = RopeSpec("llama3", 5e5, 131072, 8.0, **LLAMA3_ROPE)
    spec = AttentionSpec(32, 8, 128, rope)
    eos = (128001, 128008, 128009)
    return _uniform("llama", 128256, 4096, 14336, 32, spec, bos=128000, eos=eos)


def _llama32_1b() -> ModelConfig:
    rope = RopeSpec("llama3", 5e5, 131072, 32.0, **LLAMA3_ROPE)
    spec = AttentionSpec(32, 8, 64, rope)
    eos = (128001, 128008, 128009)
    return _uniform(
        "llama", 128256, 2048, 8192, 16, spec, tied=True, bos=128000, eos=eos
    )


def _mistral_7b() -> ModelConfig:
    spec = AttentionSpec(32, 8, 128, RopeSpec(context=32768), window=4096)
    return _uniform("mistral", 32000, 4096, 14336, 32, spec)


def _qwen2_05b() -> ModelConfig:
    rope = RopeSpec(theta=1e6, context=131072)
    spec = AttentionSpec(14, 2, 64, rope, qkv_bias=True)
    return _uniform(
        "qwen2",
        151936,
        896,
        4864,
        24,
        spec,
        eps=1e-6,
        tied=True,
        bos=None,
        eos=(151643,),
    )


def _qwen3_06b() -> ModelConfig:
    rope = RopeSpec(theta=1e6, context=40960)
    spec = AttentionSpec(16, 8, 128, rope, qk_norm=True)
    return _uniform(
        "qwen3",
        151936,
        1024,
        3072,
        28,
        spec,
        eps=1e-6,
        tied=True,
        bos=None,
        eos=(151645,),
    )


def _gemma3_270m() -> ModelConfig:
    def layer(theta: float, window: int | None) -> LayerSpec:
        rope = RopeSpec(theta=theta, context=32768)
        spec = AttentionSpec(
            4, 1, 256, rope, window=window, scale=256**-0.5, qk_norm=True
        )
        return LayerSpec(spec, MlpSpec(2048, "gelu_tanh"), norm, post_norms=True)

    norm = NormSpec(1e-6, offset=1.0)
    group = (layer(1e4, 512),) * 5 + (layer(1e6, None),)
    return ModelConfig(
        "gemma3_text",
        262144,
        640,
        (Run(group, 3),),
        32768,
        norm,
        embed_scale=640**0.5,
        bos=2,
        eos=(1,),
    )


PRESETS = {
    "smollm2-135m": _smollm2_135m,
    "llama-2-7b": _llama2_7b,
    "llama-3-8b": _llama3_8b,
    "llama-3.1-8b": _llama31_8b,
    "llama-3.2-1b": _llama32_1b,
    "mistral-7b-v0.1": _mistral_7b,
    "qwen2-0.5b": _qwen2_05b,
    "qwen3-0.6b": _qwen3_06b,
    "gemma-3-270m": _gemma3_270m,
    **mamba_presets.PRESETS,
    **mamba2_presets.PRESETS,
    **jamba_presets.PRESETS,
    **megalodon_presets.PRESETS,
    **tiny_presets.PRESETS,
}
PRESETS |= hybrid_presets.over(PRESETS)


def preset(name: str) -> ModelConfig:
    """The configuration of a published model."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]()
