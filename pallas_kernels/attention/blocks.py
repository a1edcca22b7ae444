"""Which blocks of the score matrix a kernel visits, and what of each is visible.

A walk lists its visits one after the other, so a kernel's grid has no idle steps: block
rows in order for a sum over keys, block columns in order for a sum over queries. A
block in which some pairs are hidden refers to a pattern: for each of its queries the
sorted keys at which visibility turns on or off. Equal patterns are stored once, so a
mask with a period costs a few, however long the text is.
"""

import dataclasses
import functools
import itertools

import numpy as np

from pallas_kernels import tuning
from pallas_kernels.mask import EMPTY, FULL, PARTIAL, Mask

# Bits of `Visits.what`; the pattern's number is above them.
FIRST, LAST, SEEN, MASKED, SHIFT = 1, 2, 4, 8, 4
MOST_VISITS = 96 << 10  # two 32-bit words each in scalar memory of 1 MiB
MOST_EDGES = 16  # of a pattern: beyond, comparing costs more than the products
MOST_PATTERNS = 64 << 20  # bytes
_CELLS = 1 << 24  # largest block map
LEAST = 128  # queries and keys of the smallest block: the lanes of a register
_SIZES = (LEAST, 256, 512, 1024)


class TooLong(str):
    """A reason against a walk that fewer queries do not give."""


@dataclasses.dataclass(frozen=True, eq=False)
class Visits:
    """`where`: query block | key block << 16; `what`: bits | pattern << SHIFT."""

    where: np.ndarray
    what: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """Visits in both orders and the patterns, int32 [patterns, edges, block_q].

    Of a query, the keys of a block from its 1st edge to its 2nd are visible, then from
    its 3rd to its 4th; unused edges are `block_k`.
    """

    block_q: int
    block_k: int
    by_rows: Visits
    by_columns: Visits
    patterns: np.ndarray

    @property
    def pairs(self) -> int:
        """Pairs computed for one query head, masked ones included."""
        seen = (self.by_rows.what & SEEN) != 0
        return int(seen.sum()) * self.block_q * self.block_k


def walk(mask: Mask, T: int, S: int, offset: int, heads: int) -> Walk | str:
    """The cheapest walk of a head-independent mask, or why there is none.

    `heads` query heads are rows of one block. A visit has at most `tile` pairs; a step
    of the grid costs as much as `step` of them, comparing a pair with a pattern as
    `compare` (`tuning`).
    """
    sizes = tuning.of("attention_tpu")
    return _walk(
        mask, (T, S, offset), heads, sizes.tile, sizes.step, sizes.compare, MOST_VISITS
    )


@functools.lru_cache(maxsize=256)
def _walk(mask, place, heads: int, most: int, step: int, compare: float, visits: int):
    T, S, offset = place
    base = LEAST
    while (T // base) * (S // base) > _CELLS:
        base *= 2
    cells = mask.summary(T, S, base, base, offset=offset)[0]
    choices = []
    for block_q, block_k in itertools.product(_SIZES, _SIZES):
        tile = heads * block_q * block_k
        spare = any(
            size > LEAST and 2 * length <= size
            for length, size in ((T, block_q), (S, block_k))
        )
        large = tile > most and block_q > LEAST
        if min(block_q, block_k) < base or spare or large:
            continue
        kinds = _coarse(cells, block_q // base, block_k // base)
        count = max(np.maximum((kinds != EMPTY).sum(a), 1).sum() for a in (0, 1))
        if count <= visits:
            extra = (kinds == PARTIAL).sum() * tile * 2 * compare
            choices.append((count * (tile + step) + extra, block_q, block_k))
    if not choices:
        return TooLong(f"{T} x {S} tokens under this mask need over {visits} visits")
    for _, block_q, block_k in sorted(choices):
        kinds = _coarse(cells, block_q // base, block_k // base)
        found = _build(mask, (T, S, offset), block_q, block_k, kinds)
        if found.patterns.shape[1] <= MOST_EDGES:
            break
    edges, size = found.patterns.shape[1], found.patterns.nbytes
    if edges > MOST_EDGES or size > MOST_PATTERNS:
        return f"this mask needs patterns of {edges} edges and {size} bytes"
    return found


def build(mask: Mask, T: int, S: int, offset: int, block_q: int, block_k: int) -> Walk:
    """The walk with blocks of these sizes."""
    kinds = mask.summary(T, S, block_q, block_k, offset=offset)[0]
    return _build(mask, (T, S, offset), block_q, block_k, kinds)


def _coarse(kinds: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The block map with `rows` x `columns` blocks made one."""
    pad = [(0, -n % size) for n, size in zip(kinds.shape, (rows, columns), strict=True)]
    shape = -(-kinds.shape[0] // rows), rows, -(-kinds.shape[1] // columns), columns

    def join(flags, operation, padding):
        flags = np.pad(flags, pad, constant_values=padding)
        return operation(flags.reshape(shape), axis=(1, 3))

    full = join(kinds == FULL, np.all, True)
    return np.where(full, FULL, join(kinds != EMPTY, np.any, False)).astype(np.int8)


def _build(mask: Mask, place, block_q: int, block_k: int, kinds: np.ndarray) -> Walk:
    T, S, offset = place
    if S % block_k:
        kinds[:, -1] = np.where(kinds[:, -1] == FULL, PARTIAL, kinds[:, -1])
    row, column = np.nonzero(kinds == PARTIAL)
    patterns, number = _patterns(mask, T, S, offset, block_q, block_k, row, column)
    numbers = np.zeros(kinds.shape, np.int32)
    numbers[row, column] = number
    by_columns = _visits(kinds.T, numbers.T)
    where = by_columns.where
    turned = dataclasses.replace(by_columns, where=where >> 16 | (where & 0xFFFF) << 16)
    return Walk(block_q, block_k, _visits(kinds, numbers), turned, patterns)


def _visits(kinds: np.ndarray, numbers: np.ndarray) -> Visits:
    """Blocks that are not empty, row by row; an empty row is one visit of nothing."""
    visited = kinds != EMPTY
    visited[~visited.any(1), 0] = True
    row, column = np.nonzero(visited)
    kind, number = kinds[row, column], numbers[row, column]
    turn = np.diff(row) > 0
    what = np.where(np.append(True, turn), FIRST, 0)
    what |= np.where(np.append(turn, True), LAST, 0)
    what |= np.where(kind != EMPTY, SEEN, 0) | np.where(kind == PARTIAL, MASKED, 0)
    # A visit without a pattern names the one before it: nothing new is loaded.
    last = np.maximum.accumulate(np.where(kind == PARTIAL, np.arange(len(kind)), 0))
    what |= number[last] << SHIFT
    return Visits((row | column << 16).astype(np.int32), what.astype(np.int32))


def _patterns(mask, T, S, offset, block_q, block_k, row, column):
    """Distinct patterns of the given blocks, and the number of each block's."""
    if not len(row):
        return np.full((1, 2, block_q), block_k, np.int32), np.zeros(0, np.int32)
    parts = []
    for at in np.unique(row):
        rows = offset + np.arange(at * block_q, min(T, (at + 1) * block_q))
        starts = column[row == at].astype(np.int64) * block_k
        parts.append(_edges(mask, rows, S, starts, block_k, block_q))
    width = max(part.shape[2] for part in parts)
    edges = np.full((len(row), block_q, width), block_k, np.int32)
    done = 0
    for part in parts:
        edges[done : done + len(part), : part.shape[1], : part.shape[2]] = part
        done += len(part)
    flat = np.ascontiguousarray(edges.transpose(0, 2, 1)).reshape(len(edges), -1)
    keys = flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1])))
    _, first, number = np.unique(keys.ravel(), return_index=True, return_inverse=True)
    patterns = flat[first].reshape(-1, width, block_q)
    return patterns, number.reshape(-1).astype(np.int32)


def _edges(mask, rows, S, starts, block_k, block_q) -> np.ndarray:
    """Edges [blocks, block_q, n] of `rows` in the key blocks that begin at `starts`."""
    low, high = (np.sort(x, axis=1) for x in mask.intervals(rows, S))
    most = low.shape[1]
    line = np.arange(len(rows)) * (S + 1)
    flat_low, flat_high = ((x + line[:, None]).ravel() for x in (low, high))
    # The intervals that reach into a block: from the first that ends in or after it.
    begin = np.searchsorted(flat_high, starts[:, None] + line, side="right")
    ends = np.minimum(starts + block_k, S + 1)[:, None]
    count = np.searchsorted(flat_low, ends + line, side="left") - begin
    width = max(1, int(count.max()))
    index = begin[..., None] + np.arange(width)
    inside = np.arange(width) < count[..., None]
    index = np.minimum(index, most * len(rows) - 1)
    pair = [
        np.where(
            inside, np.clip(x.ravel()[index] - starts[:, None, None], 0, block_k), 0
        )
        for x in (low, high)
    ]
    turns = np.sort(np.stack(pair, -1).reshape(len(starts), len(rows), -1), -1)
    # An edge met twice is none: intervals touch there, or one is empty.
    place = np.arange(turns.shape[-1])
    new = np.ones(turns.shape, bool)
    new[..., 1:] = turns[..., 1:] != turns[..., :-1]
    run = place - np.maximum.accumulate(np.where(new, place, 0), axis=-1)
    last = np.ones(turns.shape, bool)
    last[..., :-1] = new[..., 1:]
    edges = np.sort(np.where(last & (run % 2 == 0), turns, block_k), -1)
    used = max(2, int((edges < block_k).sum(-1).max()))
    edges = edges[..., : used + used % 2]
    # Rows past the last query see what it sees, which makes few patterns.
    short = block_q - len(rows)
    return np.pad(edges, ((0, 0), (0, short), (0, 0)), mode="edge").astype(np.int32)
