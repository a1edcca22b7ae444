"""Which tiles of the score matrix a block-wise attention visits.

A row of `block_q` queries visits two kinds of tiles: `wide` ones, in which every
pair is visible, and `narrow` ones, which carry a range of keys and are masked pair by
pair. Sizes are picked per mask by a cost model: visited pairs plus a fixed price per
tile, with constants measured on a CPU.
"""

import dataclasses
import functools

import numpy as np

from pallas_kernels.mask import EMPTY, FULL, Mask

_CELLS = 1 << 24  # largest base map
_STEP = 60.0  # microseconds a tile costs whatever its size
_PAIR, _MASKED = 1.5e-3, 2.0e-3  # microseconds a visited pair costs
_TILE = 1 << 19  # pairs in one tile, all its heads counted
_BASE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Tiles of every row of queries; starts are keys, ranges are [low, high)."""

    block_q: int
    wide: int
    narrow: int
    batch: int
    keys: int
    wide_counts: np.ndarray
    wide_starts: np.ndarray
    narrow_counts: np.ndarray
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
        wide, narrow = self.wide_counts.sum(), self.narrow_counts.sum()
        return int(self.block_q * (wide * self.wide + narrow * self.narrow))


@functools.lru_cache(maxsize=256)
def plan(mask: Mask, T: int, S: int, offset: int, group: int, kv_heads: int) -> Plan:
    """The cheapest plan for a head-independent mask.

    `group` query heads share each of `kv_heads` key/value heads.
    """
    base, seen, full = _base_map(mask, T, S, offset)
    best, best_cost = None, np.inf
    for factor in (1, 2, 4, 8):
        block_q = base * factor
        if factor > 1 and block_q >= 2 * T:
            break
        rows = _coarse(seen, full, factor)
        for wide in _widths(base, S):
            full_runs, rest = _split(*rows, wide)
            longest = max((n for _, _, n in rest), default=1)
            for narrow in sorted({1, 2, 4, longest}):
                width = max(narrow, wide)
                if narrow > longest or width * base * block_q * group > 2 * _TILE:
                    continue
                batch = _batch(kv_heads, group * block_q * width * base)
                tiles = [(r, s + o, min(narrow, n - o)) for r, s, n in rest
                         for o in range(0, n, narrow)]  # fmt: skip
                area = group * batch * block_q * base
                cost = len(full_runs) * (_STEP + area * wide * _PAIR)
                cost += len(tiles) * (_STEP + area * narrow * _MASKED)
                cost += len(rows[0]) * _STEP
                cost /= batch
                if cost < best_cost:
                    best_cost = cost
                    best = (block_q, wide, narrow, batch, full_runs, tiles)
    assert best is not None
    return _build(base, T, S, *best)


def _widths(base: int, S: int) -> tuple[int, ...]:
    tiles = -(-S // base)
    return tuple(w for w in (0, 4, 8, 16) if w * base <= 1024 and w <= tiles)


def _batch(kv_heads: int, tile: int) -> int:
    sizes = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    return max(n for n in sizes if n == 1 or n * tile <= _TILE)


def _base_map(mask: Mask, T: int, S: int, offset: int):
    base = _BASE
    while (T // base) * (S // base) > _CELLS:
        base *= 2
    kinds = mask.summary(T, S, base, base, offset=offset)[0]
    seen, full = kinds != EMPTY, kinds == FULL
    if S % base:
        full[:, -1] = False
    return base, seen, full


def _coarse(seen: np.ndarray, full: np.ndarray, factor: int):
    pad = ((0, -len(seen) % factor), (0, 0))
    seen = np.pad(seen, pad).reshape(-1, factor, seen.shape[1]).any(1)
    full = np.pad(full, pad, constant_values=True)
    return seen, full.reshape(-1, factor, full.shape[1]).all(1)


def _runs(flags: np.ndarray) -> np.ndarray:
    """Maximal runs of True per row: int [runs, 3] of (row, start, length)."""
    edge = np.diff(np.pad(flags, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, start = np.nonzero(edge == 1)
    stop = np.nonzero(edge == -1)[1]
    return np.stack([row, start, stop - start], 1)


def _split(seen: np.ndarray, full: np.ndarray, wide: int):
    """Wide tiles (row, start) and the runs (row, start, length) that remain."""
    rest = seen.copy()
    tiles = []
    if wide:
        for row, start, length in _runs(full & seen):
            for at in range(start, start + length - wide + 1, wide):
                tiles.append((row, at))
                rest[row, at : at + wide] = False
    return tiles, [tuple(r) for r in _runs(rest)]


def _table(rows: int, entries: list[tuple[int, ...]], columns: int):
    """Counts per row and padded int32 tables [rows, most] of the other columns."""
    counts = np.zeros(rows, np.int32)
    for entry in entries:
        counts[entry[0]] += 1
    tables = np.zeros((columns, rows, max(1, counts.max(initial=0))), np.int32)
    used = np.zeros(rows, np.int32)
    for row, *values in entries:
        tables[:, row, used[row]] = values
        used[row] += 1
    return counts, tables


def _build(base, T, S, block_q, wide, narrow, batch, full_runs, tiles) -> Plan:
    keys = max(-(-S // base), wide, narrow)
    wide_counts, wide_tables = _table(-(-T // block_q), full_runs, 1)
    spans = [(r, min(s, keys - narrow), s, s + n) for r, s, n in tiles]
    narrow_counts, narrow_tables = _table(-(-T // block_q), spans, 3)
    start, low, high = narrow_tables * base
    return Plan(
        block_q=block_q, wide=wide * base, narrow=narrow * base, batch=batch,
        keys=keys * base, wide_counts=wide_counts, wide_starts=wide_tables[0] * base,
        narrow_counts=narrow_counts, narrow_starts=start, narrow_low=low,
        narrow_high=np.minimum(high, S),
    )  # fmt: skip
