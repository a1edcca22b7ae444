"""Mamba-1 as published (arXiv 2312.00752; the state-spaces/mamba checkpoints)."""

import functools
from collections.abc import Callable

from lclm.config import LayerSpec, ModelConfig, NormSpec, Run
from lclm.specs import MambaSpec

SIZES = {
    "mamba-130m": (768, 24),
    "mamba-370m": (1024, 48),
    "mamba-790m": (1536, 48),
    "mamba-1.4b": (2048, 48),
    "mamba-2.8b": (2560, 64),
}


def _mamba(width: int, depth: int) -> ModelConfig:
    norm = NormSpec(1e-5)
    spec = MambaSpec(inner=2 * width, rank=width // 16)
    return ModelConfig(
        family="mamba",
        vocab=50280,
        width=width,
        stack=(Run((LayerSpec(spec, None, norm),), depth),),
        context=2048,
        norm=norm,
        bos=0,
        eos=(0,),
        residual_float32=True,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    name: functools.partial(_mamba, *size) for name, size in SIZES.items()
}
