"""The patterns of the table: causal masks from whole-number options."""

import dataclasses
from collections.abc import Callable

import numpy as np

from lclm.errors import LclmError
from pallas_kernels import mask as masks
from pallas_kernels.mask import Mask


def _mask(make: Callable[..., Mask], *sizes: int, **options: int) -> Mask:
    """A mask whose bad sizes are errors of ours."""
    try:
        return masks.causal() & make(*sizes, **options)
    except ValueError as error:
        raise LclmError(str(error)) from None


def causal() -> Mask:
    """Every earlier token and itself."""
    return masks.causal()


def window(window: int = 1024) -> Mask:
    """The last `window` tokens, itself included."""
    return _mask(masks.window, window)


def sink_window(sinks: int = 4, window: int = 1024) -> Mask:
    """The first `sinks` tokens and the last `window` (arXiv 2309.17453)."""
    return _mask(masks.window, window) | _mask(masks.sink, sinks)


def chunk(chunk: int = 2048) -> Mask:
    """Tokens of the query's own block of `chunk` (arXiv 2404.08801)."""
    return _mask(masks.chunk, chunk)


def shifted_groups(
    group: int = 2048, ratio: float = 0.0, wrap: int = 0, length: int = 0
) -> Mask:
    """S2-Attn (arXiv 2309.12307): groups of `group`, half a group on in half the heads.

    length: tokens of a row, which training fills in (`for_length`); `ratio` of it is a
    group, 0.25 in the paper. One group of the whole row is not shifted. wrap=1 is the
    paper's pseudocode, in which the first half group of a shifted head sees the last of
    the row: later tokens leak into earlier ones.

    Raises:
      LclmError: a group that is odd or does not divide the row; `ratio` or `wrap`
        without a length.
    """
    if (ratio or wrap) and not length:
        raise LclmError(
            f"shifted_groups with ratio={ratio}, wrap={wrap} needs the length of rows, "
            "which training knows: use it as model.pattern, or give length="
        )
    if ratio:
        group = int(length * ratio)
    if group < 1 or group % 2 or length % group:
        raise LclmError(
            f"S2-Attn groups of {group} tokens in rows of {length or 'any length'}: a "
            "group is an even number of tokens that divides the length of a row"
        )
    if length == group:
        return masks.causal()
    if wrap:
        return Rolled(group, group // 2, length)
    return _mask(masks.group, group)


@dataclasses.dataclass(frozen=True)
class Rolled(Mask):
    """S2-Attn with wrap-around: shifted heads see groups of the row rolled by `shift`.

    Order inside a group is that of the rolled row, so the last group holds the end of
    the row and then its beginning. Not causal.
    """

    size: int
    shift: int
    length: int

    @property
    def varies(self) -> bool:
        """Half the heads are shifted."""
        return True

    def at_head(self, head: int, heads: int) -> Mask:
        """The rolled groups of one head; plain groups in the first half."""
        if heads < 2:
            raise ValueError(f"S2-Attn with {heads} heads: it needs at least 2")
        if head < heads // 2:
            return masks.causal() & masks.chunk(self.size)
        return RolledHead(self.size, self.shift, self.length)


@dataclasses.dataclass(frozen=True)
class RolledHead(Mask):
    """`Rolled` in a shifted head."""

    size: int
    shift: int
    length: int

    def visible(self, i, j):
        """Same group of the rolled row, not later in it."""
        i, j = (i - self.shift) % self.length, (j - self.shift) % self.length
        return (i // self.size == j // self.size) & (j <= i)

    def intervals(self, rows: np.ndarray, S: int) -> tuple[np.ndarray, np.ndarray]:
        """One interval a row, two for rows that follow the seam."""
        rolled = (rows - self.shift) % self.length
        start = rolled // self.size * self.size + self.shift
        end = rolled + self.shift + 1
        seam = np.minimum(end, self.length)
        past = np.maximum(end - self.length, 0)
        lo = np.stack([np.zeros_like(past), np.minimum(start, S)], 1)
        hi = np.stack([np.minimum(past, S), np.minimum(seam, S)], 1)
        return lo, hi


def block_sparse(
    block: int = 64, local: int = 16, stride: int = 8, kv_heads: int = 1
) -> Mask:
    """Near blocks and stripes that differ between kv heads (arXiv 2410.01485)."""
    return _mask(masks.block_sparse, block, local, stride, kv_heads=kv_heads)
