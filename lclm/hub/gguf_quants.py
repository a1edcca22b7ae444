"""GGUF blocks to `PackedWeight` without changing a value.

Layouts: ggml `block_q4_0`, `block_q4_1`, `block_q5_0`, `block_q5_1`, `block_q8_0`; 32
weights a block, float16 scale (and minimum).
"""

import gguf
import numpy as np

from lclm.ops.packed import PackedWeight, pack_blocks

Quant = gguf.GGMLQuantizationType
PACKABLE = (Quant.Q4_0, Quant.Q4_1, Quant.Q5_0, Quant.Q5_1, Quant.Q8_0)
_FOUR_BIT = (Quant.Q4_0, Quant.Q4_1)


def pack(raw: np.ndarray, kind: Quant, *, bits: int) -> PackedWeight:
    """Pack rows of blocks, `raw` uint8 [out, bytes a row], at 8 or 4 bits a code.

    Types of more than 4 bits stay at 8. `kind` must be one of `PACKABLE`.
    """
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = raw.reshape(raw.shape[0], -1, size)
    scale = _half(blocks, 0)
    codes, minimum = _codes(blocks, kind)
    if bits == 4 and kind in _FOUR_BIT:
        if kind == Quant.Q4_0:
            minimum = (scale * np.float16(-8)).astype(np.float16)
        return pack_blocks(codes, scale, minimum, 4)
    offset = {Quant.Q4_0: 8, Quant.Q5_0: 16}.get(kind, 0)
    return pack_blocks(codes.astype(np.int8) - np.int8(offset), scale, minimum, 8)


def _codes(blocks: np.ndarray, kind: Quant) -> tuple[np.ndarray, np.ndarray | None]:
    if kind == Quant.Q8_0:
        return blocks[..., 2:].view(np.int8), None
    has_minimum = kind in (Quant.Q4_1, Quant.Q5_1)
    start = 4 if has_minimum else 2
    minimum = _half(blocks, 2) if has_minimum else None
    halves = blocks[..., -16:]
    codes = np.concatenate([halves & 15, halves >> 4], axis=-1)
    if kind in (Quant.Q5_0, Quant.Q5_1):
        fifth = np.unpackbits(
            blocks[..., start : start + 4], axis=-1, bitorder="little"
        )
        codes |= fifth << 4
    return codes, minimum


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")[..., 0]
