"""The released Mamba-2 models (arXiv 2405.21060): state-spaces/mamba2-*."""

import functools

from lclm.config import LayerSpec, ModelConfig, NormSpec, Run
from lclm.specs import Mamba2Spec

VOCAB = 50288  # 50277 tokens of GPT-NeoX padded to a multiple of 16
CONTEXT = 2048
SIZES = {
    "mamba2-130m": (24, 768),
    "mamba2-370m": (48, 1024),
    "mamba2-780m": (48, 1536),
    "mamba2-1.3b": (48, 2048),
    "mamba2-2.7b": (64, 2560),
}


def _mamba2(depth: int, width: int) -> ModelConfig:
    norm = NormSpec(1e-5)
    layer = LayerSpec(Mamba2Spec(heads=2 * width // 64), None, norm)
    return ModelConfig(
        "mamba2",
        VOCAB,
        width,
        (Run((layer,), depth),),
        CONTEXT,
        norm,
        bos=0,
        eos=(0,),
        residual_float32=True,
    )


PRESETS = {name: functools.partial(_mamba2, *size) for name, size in SIZES.items()}
