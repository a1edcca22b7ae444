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
MOST_BLOCKS = 1 << 15  # a side of a walk, for two numbers in one word
MOST_EDGES = 16  # of a pattern: beyond, comparing costs more than the products
MOST_PATTERNS = 64 << 20  # bytes
_CELLS = 1 << 24  # largest block map
_SLAB = 1 << 20  # blocks looked at at once where a map would be larger
_QUERIES = 1 << 18  # of blocks with hidden pairs, looked at at once
LEAST = 128  # queries and keys of the smallest block: the lanes of a register
_SIZES = (LEAST, 256, 512, 1024)


class TooLong(str):
    """A reason against a walk that fewer queries do not give."""


@dataclasses.dataclass(frozen=True, eq=False)
class Visits:
    """Query block and key block of each; `what`: bits | pattern << SHIFT. All int32."""

    row: np.ndarray
    column: np.ndarray
    what: np.ndarray

    @property
    def where(self) -> np.ndarray:
        """Query block | key block << 16, of walks of at most `MOST_BLOCKS` a side."""
        return self.row | self.column << 16


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
        many = max(-(-T // block_q), -(-S // block_k)) > MOST_BLOCKS
        if min(block_q, block_k) < base or spare or large or many:
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
        row, column = np.nonzero(kinds != EMPTY)
        listed = row, column, kinds[row, column]
        found = _build(mask, place, block_q, block_k, listed)
        if found.patterns.shape[1] <= MOST_EDGES:
            break
    edges, size = found.patterns.shape[1], found.patterns.nbytes
    if edges > MOST_EDGES or size > MOST_PATTERNS:
        return f"this mask needs patterns of {edges} edges and {size} bytes"
    return found


def build(mask: Mask, T: int, S: int, offset: int, block_q: int, block_k: int) -> Walk:
    """The walk with blocks of these sizes; its memory follows the visits."""
    place = T, S, offset
    return _build(mask, place, block_q, block_k, _listed(mask, place, block_q, block_k))


def _listed(mask: Mask, place, block_q: int, block_k: int):
    """Row, column and kind of the blocks that are not empty, some rows at a time."""
    T, S, offset = place
    step = max(1, _SLAB // -(-S // block_k)) * block_q
    parts = []
    for start in range(0, T, step):
        size = min(step, T - start)
        kinds = mask.summary(size, S, block_q, block_k, offset=offset + start)[0]
        row, column = np.nonzero(kinds != EMPTY)
        parts.append((start // block_q + row, column, kinds[row, column]))
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


def _coarse(kinds: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The block map with `rows` x `columns` blocks made one."""
    pad = [(0, -n % size) for n, size in zip(kinds.shape, (rows, columns), strict=True)]
    shape = -(-kinds.shape[0] // rows), rows, -(-kinds.shape[1] // columns), columns

    def join(flags, operation, padding):
        flags = np.pad(flags, pad, constant_values=padding)
        return operation(flags.reshape(shape), axis=(1, 3))

    full = join(kinds == FULL, np.all, True)
    return np.where(full, FULL, join(kinds != EMPTY, np.any, False)).astype(np.int8)


def _build(mask: Mask, place, block_q: int, block_k: int, listed) -> Walk:
    T, S, _ = place
    row, column, kind = listed
    down, across = -(-T // block_q), -(-S // block_k)
    if S % block_k:
        kind = np.where((column == across - 1) & (kind == FULL), PARTIAL, kind)
    masked = kind == PARTIAL
    at = row[masked], column[masked]
    patterns, found = _patterns(mask, place, block_q, block_k, *at)
    number = np.zeros(len(row), np.int32)
    number[masked] = found
    by_rows = _visits(row, column, kind, number, down)
    turned = _visits(column, row, kind, number, across)
    by_columns = Visits(turned.column, turned.row, turned.what)
    return Walk(block_q, block_k, by_rows, by_columns, patterns)


def _visits(row, column, kind, number, rows: int) -> Visits:
    """Blocks that are not empty, row by row; an empty row is one visit of nothing."""
    empty = np.setdiff1d(np.arange(rows), row)
    none = np.zeros_like(empty)
    row, column = np.append(row, empty), np.append(column, none)
    order = np.lexsort((column, row))
    row, column = row[order], column[order]
    kind = np.append(kind, np.full_like(empty, EMPTY))[order]
    number = np.append(number, none)[order].astype(np.int32)
    turn = np.diff(row) > 0
    what = np.where(np.append(True, turn), FIRST, 0)
    what |= np.where(np.append(turn, True), LAST, 0)
    what |= np.where(kind != EMPTY, SEEN, 0) | np.where(kind == PARTIAL, MASKED, 0)
    # A visit without a pattern names the one before it: nothing new is loaded.
    last = np.maximum.accumulate(np.where(kind == PARTIAL, np.arange(len(kind)), 0))
    what |= number[last] << SHIFT
    return Visits(*(x.astype(np.int32) for x in (row, column, what)))


def _patterns(mask, place, block_q, block_k, row, column):
    """Distinct patterns of the given blocks, and the number of each block's."""
    if not len(row):
        return np.full((1, 2, block_q), block_k, np.int32), np.zeros(0, np.int32)
    step = max(1, _QUERIES // block_q)
    parts = [
        _edges(
            mask, place, block_q, block_k, row[at : at + step], column[at : at + step]
        )
        for at in range(0, len(row), step)
    ]
    width = max(part.shape[2] for part in parts)
    edges = np.full((len(row), block_q, width), block_k, np.int32)
    done = 0
    for part in parts:
        edges[done : done + len(part), :, : part.shape[2]] = part
        done += len(part)
    flat = np.ascontiguousarray(edges.transpose(0, 2, 1)).reshape(len(edges), -1)
    keys = flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1])))
    _, first, number = np.unique(keys.ravel(), return_index=True, return_inverse=True)
    patterns = flat[first].reshape(-1, width, block_q)
    return patterns, number.reshape(-1).astype(np.int32)


def _edges(mask, place, block_q, block_k, row, column) -> np.ndarray:
    """Edges [blocks, block_q, n] of the queries of each block."""
    T, S, offset = place
    own, at = np.unique(row, return_inverse=True)
    within = np.arange(block_q)
    # Rows past the last query see what it sees, which makes few patterns.
    queries = np.minimum(own[:, None] * block_q + within, T - 1).ravel()
    low, high = (np.sort(x, axis=1) for x in mask.intervals(offset + queries, S))
    most = low.shape[1]
    turn = np.arange(len(queries))[:, None] * (S + 1)
    flat_low, flat_high = ((x + turn).ravel() for x in (low, high))
    line = (at[:, None] * block_q + within) * (S + 1)
    starts = column.astype(np.int64)[:, None] * block_k
    # The intervals that reach into a block: from the first that ends in or after it.
    begin = np.searchsorted(flat_high, starts + line, side="right")
    ends = np.minimum(starts + block_k, S + 1)
    count = np.searchsorted(flat_low, ends + line, side="left") - begin
    width = max(1, int(count.max()))
    index = begin[..., None] + np.arange(width)
    inside = np.arange(width) < count[..., None]
    index = np.minimum(index, most * len(queries) - 1)
    pair = [
        np.where(inside, np.clip(x.ravel()[index] - starts[..., None], 0, block_k), 0)
        for x in (low, high)
    ]
    turns = np.sort(np.stack(pair, -1).reshape(len(row), block_q, -1), -1)
    # An edge met twice is none: intervals touch there, or one is empty.
    number = np.arange(turns.shape[-1])
    new = np.ones(turns.shape, bool)
    new[..., 1:] = turns[..., 1:] != turns[..., :-1]
    run = number - np.maximum.accumulate(np.where(new, number, 0), axis=-1)
    last = np.ones(turns.shape, bool)
    last[..., :-1] = new[..., 1:]
    edges = np.sort(np.where(last & (run % 2 == 0), turns, block_k), -1)
    used = max(2, int((edges < block_k).sum(-1).max()))
    return edges[..., : used + used % 2].astype(np.int32)
