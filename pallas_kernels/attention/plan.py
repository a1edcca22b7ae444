"""Which tiles of the score matrix a block-wise attention visits.

A block of `block_q` queries visits two kinds of tiles: `wide` ones, whole blocks of
queries in which every pair is visible, and `narrow` ones, `sub` queries of the block
against a range of keys, masked pair by pair. Sizes are picked per mask by a cost
model: computed pairs plus a fixed price per tile.
"""

import dataclasses
import functools
import itertools

import numpy as np

from pallas_kernels.mask import EMPTY, FULL, Mask

_CELLS = 1 << 24  # largest base map
_BASE = 64  # queries and keys of a cell of the base map
_PACKED = 4  # cells along a tile's queries in packed rows, where rows are short
_TILE = 3 << 19  # most pairs in a tile of several kv heads, all heads counted
SMALL_TILE = 3 << 18  # most pairs in any tile of a backward pass, which holds 3 arrays
# Microseconds, measured on two CPU cores: a tile of any size, a pair, what masking adds
# to it, and loading and storing one row of queries. Packing keys for a product costs as
# much as `_PACK` more rows, adding to the numerator as `_ADD` more keys.
_STEP, _PAIR, _MASK, _ROW, _PACK, _ADD = 60.0, 1.1e-3, 0.2e-3, 2e-2, 180, 80


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Tiles of every block of queries; starts are keys, ranges are [low, high).

    `ranged` says that the mask alone does not keep narrow tiles to their ranges. Every
    start and size is a multiple of `cell`.
    """

    block_q: int
    sub: int
    wide: int
    narrow: int
    batch: int
    keys: int
    ranged: bool
    cell: int
    wide_counts: np.ndarray
    wide_starts: np.ndarray
    narrow_counts: np.ndarray
    narrow_rows: np.ndarray
    narrow_starts: np.ndarray
    narrow_low: np.ndarray
    narrow_high: np.ndarray

    @property
    def rows(self) -> int:
        """Number of query blocks."""
        return len(self.wide_counts)

    @property
    def pairs(self) -> int:
        """Pairs computed for one query head, masked ones included."""
        wide = self.wide_counts.sum() * self.block_q * self.wide
        return int(wide + self.narrow_counts.sum() * self.sub * self.narrow)


@functools.lru_cache(maxsize=256)
def plan(
    mask: Mask,
    T: int,
    S: int,
    offset: int,
    group: int,
    kv_heads: int,
    packed: bool = False,
    tile: int | None = None,
) -> Plan:
    """The cheapest plan for a head-independent mask.

    `group` query heads share each of `kv_heads` key/value heads. `packed`: segment ids
    will hide more; tiles are small enough that many of them can be passed over. `tile`:
    most pairs of a tile where a smaller one exists, its query heads counted.
    """
    base, seen, full = _base_map(mask, T, S, offset)
    best, sizes = np.inf, None
    factors = [f for f in (1, 2, 4, 8, 16) if f == 1 or f * base < 2 * T]
    most = seen.shape[1]
    if packed:
        side = max(_PACKED, T // 8 // base)
        factors, most = [f for f in factors if f <= side], max(1, side // 2)
    widths = [w for w in (0, 4, 8, 16) if w <= seen.shape[1]]
    for factor, wide in itertools.product(factors, widths):
        starts, rest = _split(seen, full, factor, wide)
        for sub in (f for f in factors if factor % f == 0):
            runs = _runs(_coarse(rest, sub, np.any, False))[:, 2]
            longest = min(most, int(runs.max(initial=1)))
            for narrow in sorted({n for n in (1, 2, 4, 8, longest) if n <= longest}):
                tiles = int((-(-runs // narrow)).sum())
                pairs = base * base * max(sub * narrow, factor * wide)
                if tile is not None and group * pairs > max(tile, group * base * base):
                    continue
                for batch in _batches(kv_heads, group * pairs, tile or _TILE):
                    price = len(starts) * _price(group, batch, base, factor, wide)
                    price += tiles * _price(group, batch, base, sub, narrow, _MASK)
                    price = price / batch + len(seen) * base * group * _ROW
                    if price < best:
                        best, sizes = price, (factor, sub, wide, narrow, batch)
    return build(base, seen, full, S, *sizes)


def _price(group, batch, base, rows, width, mask=0.0) -> float:
    """Microseconds for one tile."""
    if not width:
        return 0.0
    rows, width = group * rows * base, width * base
    pair = _PAIR * (1 + _PACK / rows + _ADD / width) + mask
    return _STEP + batch * rows * width * pair


def _batches(kv_heads: int, pairs: int, most: int) -> list[int]:
    sizes = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    return [n for n in sizes if n == 1 or n * pairs <= most]


def _base_map(mask: Mask, T: int, S: int, offset: int):
    """Size of a cell and bool maps of cells that are not empty, and that are full."""
    base = _BASE
    while (T // base) * (S // base) > _CELLS:
        base *= 2
    kinds = mask.summary(T, S, base, base, offset=offset)[0]
    seen, full = kinds != EMPTY, kinds == FULL
    if S % base:
        full[:, -1] = False
    return base, seen, full


def _coarse(cells: np.ndarray, factor: int, join, padding: bool) -> np.ndarray:
    """Join every `factor` rows of cells."""
    pad = ((0, -len(cells) % factor), (0, 0))
    cells = np.pad(cells, pad, constant_values=padding)
    return join(cells.reshape(-1, factor, cells.shape[1]), axis=1)


def _runs(flags: np.ndarray) -> np.ndarray:
    """Maximal runs of True per row: int [runs, 3] of (row, start, length)."""
    edge = np.diff(np.pad(flags, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, start = np.nonzero(edge == 1)
    stop = np.nonzero(edge == -1)[1]
    return np.stack([row, start, stop - start], 1)


def _pieces(runs: np.ndarray, size: int, ragged: bool) -> np.ndarray:
    """Cut runs into (row, start, length) pieces of `size`, the last may be ragged."""
    row, start, length = runs.T
    counts = -(-length // size) if ragged else length // size
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    at = np.repeat(start, counts) + index * size
    left = np.repeat(start + length, counts) - at
    return np.stack([np.repeat(row, counts), at, np.minimum(left, size)], 1)


def _split(seen: np.ndarray, full: np.ndarray, factor: int, wide: int):
    """Wide tiles (row, start, length) and the cells that they leave."""
    if not wide:
        return np.zeros((0, 3), int), seen
    tiles = _pieces(_runs(_coarse(full, factor, np.all, True)), wide, False)
    edges = np.zeros((-(-len(seen) // factor), seen.shape[1] + 1), np.int8)
    np.add.at(edges, (tiles[:, 0], tiles[:, 1]), 1)
    np.add.at(edges, (tiles[:, 0], tiles[:, 1] + wide), -1)
    taken = np.cumsum(edges[:, :-1], 1, dtype=np.int8).astype(bool)
    return tiles, seen & ~np.repeat(taken, factor, axis=0)[: len(seen)]


def _table(rows: int, row: np.ndarray, *columns: np.ndarray):
    """Entries per row, and each column as a padded int32 table [rows, most]."""
    counts = np.bincount(row, minlength=rows).astype(np.int32)
    order = np.argsort(row, kind="stable")
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    tables = np.zeros((len(columns), rows, max(1, counts.max(initial=0))), np.int32)
    for table, column in zip(tables, columns, strict=True):
        table[row[order], place] = column[order]
    return counts, tables


def _ranged(seen: np.ndarray, pieces: np.ndarray, narrow: int, whole: int) -> bool:
    """Whether a piece, extended to `narrow` cells, reaches others or past `whole`."""
    row, low, length = pieces.T
    if (low + narrow > whole).any():
        return True
    counts = np.pad(np.cumsum(seen, axis=1, dtype=np.int32), ((0, 0), (1, 0)))
    return bool((counts[row, low + narrow] > counts[row, low + length]).any())


def build(base, seen, full, S, factor, sub, wide, narrow, batch) -> Plan:
    """The plan with these sizes, given in cells of the base map."""
    keys = max(seen.shape[1], wide, narrow)
    rows = -(-len(seen) // factor)
    tiles, rest = _split(seen, full, factor, wide)
    wide_counts, (starts,) = _table(rows, tiles[:, 0], tiles[:, 1] * base)
    pieces = _pieces(_runs(_coarse(rest, sub, np.any, False)), narrow, True)
    row, low, length = pieces.T
    per = factor // sub
    narrow_counts, tables = _table(
        rows, row // per, row % per * sub * base,
        np.minimum(low, keys - narrow) * base, low * base,
        np.minimum((low + length) * base, S),
    )  # fmt: skip
    cells = _coarse(seen, sub, np.any, False)
    ranged = _ranged(cells, pieces, narrow, S // base)
    return Plan(
        factor * base, sub * base, wide * base, narrow * base, batch, keys * base,
        ranged, base, wide_counts, starts, narrow_counts, *tables,
    )  # fmt: skip
