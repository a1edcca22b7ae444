"""Adapters over flat parameters: laid beside the matrices they change, and merged."""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lclm.errors import LclmError
from lclm.ops.lora import LoraWeight
from lclm.typing import Array, Params

DOWN, UP = "/lora_down", "/lora_up"


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters on matrices whose path matches `on` (arXiv 2106.09685).

    The default is LongLoRA's choice (arXiv 2309.12307): all four projections of
    attention, rank 8, alpha 16.
    """

    rank: int = 8
    alpha: float = 16.0
    on: tuple[str, ...] = (r"attn/[qkvo]/weight$",)

    def __post_init__(self):
        if self.rank < 1:
            raise LclmError(f"LoRA rank is {self.rank}; it must be at least 1")

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


def adapters(flat: Params, spec: LoraSpec, key: Array) -> Params:
    """Fresh adapters by path: `.../weight/lora_down` [..., r, in], zero `lora_up`.

    `flat` may be stacked ([repeats, out, in]); each layer gets its own. Raises
    LclmError where no path matches.
    """
    chosen = [p for p in flat if any(re.search(on, p) for on in spec.on)]
    for path in chosen:
        if not _projection(path, flat[path].ndim):
            raise LclmError(
                f"LoRA on {list(spec.on)} matches {path}, which is no matrix of a "
                "projection: narrow the pattern, or train it whole (model.trains)"
            )
    if not chosen:
        raise LclmError(
            f"LoRA on {list(spec.on)} matches no parameter; paths look like "
            f"{', '.join(list(flat)[:3])}"
        )
    out = {}
    for path, one in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *lead, rows, columns = flat[path].shape
        bound = columns**-0.5
        shape = (*lead, spec.rank, columns)
        out[path + DOWN] = jax.random.uniform(one, shape, minval=-bound, maxval=bound)
        out[path + UP] = jnp.zeros((*lead, rows, spec.rank))
    return out


def _projection(path: str, axes: int) -> bool:
    """Whether a parameter is a projection's matrix, or a stack of experts'."""
    axes -= path.startswith("run_")
    if re.search(r"/experts/(gate|up|down)$", path):
        return axes == 3
    return axes == 2 and path.endswith("/weight")


def attach(flat: Params, spec: LoraSpec | None) -> Params:
    """Flat parameters with each matrix that has adapters as one `LoraWeight`."""
    out = {p: leaf for p, leaf in flat.items() if not p.endswith((DOWN, UP))}
    for path in flat:
        if path.endswith(DOWN):
            name = path.removesuffix(DOWN)
            out[name] = LoraWeight(flat[name], flat[path], flat[name + UP], spec.scale)
    return out


def merge(flat: Params, spec: LoraSpec | None) -> Params:
    """Flat parameters with the adapters added into their matrices, types kept."""
    return {
        p: leaf.dequantize(leaf.dtype) if isinstance(leaf, LoraWeight) else leaf
        for p, leaf in attach(flat, spec).items()
    }
