"""Symbolic attention masks: which keys may a query see.

A mask is a frozen, hashable expression. The same object gives the dense oracle
(`array`), the block map that drives a kernel (`summary`), the exact pair count
(`pairs`) and the costs that follow from it (`flops`, `kv_bytes`).

Rows are queries, columns are keys. `T` queries sit at positions
`offset .. offset + T` of a key axis of length `S`. Every mask can be evaluated in
two ways: element by element (`visible`), and per row as disjoint key intervals
(`intervals`); counts and block maps come from the intervals, so no `T x S` array is
made for them. A decoding step, whose position is traced, asks for `seen_blocks`.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2
_ENTRIES = 1 << 20  # interval entries held at once while counting


def _require(name: str, value: object, low: int, remedy: str) -> None:
    integral = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not integral or value < low:
        raise ValueError(f"{name}={value!r}: must be an integer >= {low}; {remedy}")


@dataclasses.dataclass(frozen=True)
class Mask:
    """Base of all masks: combine with `&` and `|`."""

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def at_head(self, head: int, heads: int) -> "Mask":
        """The head-independent mask that query head `head` of `heads` uses."""
        return self

    @property
    def varies(self) -> bool:
        """Whether the mask may differ from head to head."""
        return False

    def visible(self, i, j):
        """Whether absolute position `i` sees key `j`, broadcasting, NumPy or jax."""
        raise NotImplementedError

    def intervals(self, rows: np.ndarray, S: int) -> tuple[np.ndarray, np.ndarray]:
        """Visible keys of each row as disjoint intervals `lo, hi` int64 [R, m].

        Entries lie in [0, S]; unused ones are empty (`lo == hi`).
        """
        raise NotImplementedError

    @property
    def grain(self) -> int:
        """Keys per block of the grid that the mask is made on; 0 where any will do."""
        return 0

    def seen_blocks(self, i, block: int, S: int):
        """Blocks of `block` keys that hold all a query at `i` [...] sees: int [..., n].

        `i` may be traced and n follows from the mask, `block` (which divides `grain`)
        and S alone. Each block comes once, -1 is none; a block may be wholly hidden or
        lie past S. None: the mask does not say, so any key may be seen.
        """
        return None

    def layout(self, heads: int | None = None) -> tuple["Mask", ...]:
        """One head-independent mask per head, or a single one where all agree."""
        if heads is None:
            if self.varies:
                raise ValueError(
                    "heads=None: this mask differs between heads, so the number of "
                    "query heads is needed; pass heads=N"
                )
            return (self,)
        _require("heads", heads, 1, "pass the number of query heads")
        masks = tuple(self.at_head(h, heads) for h in range(heads))
        return masks[:1] if len(set(masks)) == 1 else masks

    def array(
        self, T: int, S: int, heads: int | None = None, offset: int = 0
    ) -> np.ndarray:
        """Dense oracle: bool [N or 1, T, S]."""
        _check_shape(T, S, offset)
        i = offset + np.arange(T)[:, None]
        j = np.arange(S)[None, :]
        rows = [
            np.broadcast_to(np.asarray(m.visible(i, j), bool), (T, S))
            for m in self.layout(heads)
        ]
        return np.stack(rows)

    def summary(
        self,
        T: int,
        S: int,
        block_q: int,
        block_k: int,
        heads: int | None = None,
        offset: int = 0,
    ) -> np.ndarray:
        """Block map: int8 [N or 1, ceil(T/block_q), ceil(S/block_k)].

        0 where no pair of the block is visible, 2 where all are, 1 otherwise.
        """
        _check_shape(T, S, offset)
        _require("block_q", block_q, 1, "give the number of queries per block")
        _require("block_k", block_k, 1, "give the number of keys per block")
        cells = np.outer(_sizes(T, block_q), _sizes(S, block_k))
        maps = []
        for mask in self.layout(heads):
            counts = _block_counts(mask, T, S, block_q, block_k, offset)
            kinds = np.where(counts == 0, EMPTY, np.where(counts == cells, FULL, 1))
            maps.append(kinds.astype(np.int8))
        return np.stack(maps)

    def pairs(self, T: int, S: int, heads: int = 1, offset: int = 0) -> int:
        """Exact number of visible (query, key) pairs, summed over `heads` heads."""
        _check_shape(T, S, offset)
        _require("heads", heads, 1, "pass the number of query heads")
        masks = collections.Counter(self.at_head(h, heads) for h in range(heads))
        return sum(n * _count(mask, T, S, offset) for mask, n in masks.items())

    def flops(
        self, T: int, S: int, *, heads: int, head_dim: int, offset: int = 0
    ) -> int:
        """FLOPs of the forward pass, scores and values: 4 * H * pairs."""
        _require("head_dim", head_dim, 1, "pass the width of one head")
        return 4 * head_dim * self.pairs(T, S, heads, offset)

    def kv_bytes(
        self,
        T: int,
        S: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        itemsize: int = 2,
        block_q: int = 128,
        offset: int = 0,
    ) -> int:
        """Bytes of keys and values read, each once per block of `block_q` queries.

        The query heads of a kv head share what they read. With T=1 this is what one
        decoding step reads, hence what a cache has to keep.
        """
        _require("kv_heads", kv_heads, 1, "pass the number of key/value heads")
        if heads % kv_heads:
            raise ValueError(
                f"kv_heads={kv_heads}: must divide heads={heads}; pass the model's "
                "number of key/value heads"
            )
        group = heads // kv_heads
        masks = [self.at_head(h, heads) for h in range(heads)]
        groups = collections.Counter(
            tuple(dict.fromkeys(masks[h : h + group])) for h in range(0, heads, group)
        )
        keys = sum(
            count * _touched(functools.reduce(Or, members), T, S, block_q, offset)
            for members, count in groups.items()
        )
        return 2 * itemsize * head_dim * keys


def _check_shape(T: int, S: int, offset: int) -> None:
    _require("T", T, 1, "give the number of queries")
    _require("S", S, 1, "give the number of keys")
    _require("offset", offset, 0, "queries start at a position of the key axis")


def _sizes(length: int, block: int) -> np.ndarray:
    starts = np.arange(0, length, block)
    return np.minimum(block, length - starts)


# Interval arithmetic. `lo`, `hi` are [R, m], disjoint within a row.


def _pack(lo: np.ndarray, hi: np.ndarray, S: int) -> tuple[np.ndarray, np.ndarray]:
    """Clip to [0, S], sort by start and drop columns that are empty in every row."""
    lo, hi = np.clip(lo, 0, S), np.clip(hi, 0, S)
    empty = hi <= lo
    lo, hi = np.where(empty, S, lo), np.where(empty, S, hi)
    if lo.shape[1] > 1:
        order = np.argsort(lo, axis=1, kind="stable")
        lo = np.take_along_axis(lo, order, 1)
        hi = np.take_along_axis(hi, order, 1)
    keep = max(1, int((~empty).sum(1).max(initial=0)))
    return lo[:, :keep], hi[:, :keep]


def _single(lo, hi, rows: np.ndarray, S: int) -> tuple[np.ndarray, np.ndarray]:
    lo = np.broadcast_to(np.asarray(lo, np.int64), rows.shape)[:, None]
    hi = np.broadcast_to(np.asarray(hi, np.int64), rows.shape)[:, None]
    return _pack(lo, hi, S)


def _union(lo: np.ndarray, hi: np.ndarray, S: int) -> tuple[np.ndarray, np.ndarray]:
    """Make overlapping intervals disjoint without changing what they cover."""
    lo, hi = _pack(lo, hi, S)
    reach = np.maximum.accumulate(hi, axis=1)
    lo[:, 1:] = np.maximum(lo[:, 1:], reach[:, :-1])
    return _pack(lo, hi, S)


def _library(*arrays):
    """jax.numpy where one of the arrays is traced or of jax, else NumPy."""
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def _span(first, last, size: int, block: int):
    """Blocks from that of key `first` to that of key `last`, `size` keys at most."""
    xp = _library(first)
    start = xp.maximum(first, 0)[..., None] // block
    seen = start + np.arange((size + block - 2) // block + 1)
    return xp.where(seen <= last[..., None] // block, seen, -1)


def _chunks(mask: Mask, T: int, S: int, offset: int, unit: int = 1) -> Iterator:
    """Row positions in pieces that keep the interval arrays small."""
    columns = mask.intervals(np.array([offset + T - 1]), S)[0].shape[1]
    step = max(1, _ENTRIES // (columns * unit)) * unit
    for start in range(0, T, step):
        yield start, offset + np.arange(start, min(T, start + step))


def _count(mask: Mask, T: int, S: int, offset: int) -> int:
    total = 0
    for _, rows in _chunks(mask, T, S, offset):
        lo, hi = mask.intervals(rows, S)
        total += int((hi - lo).sum())
    return total


def _block_counts(
    mask: Mask, T: int, S: int, block_q: int, block_k: int, offset: int
) -> np.ndarray:
    """Visible pairs in each block, from first differences along the key blocks."""
    nq, nk = -(-T // block_q), -(-S // block_k)
    steps = np.zeros(nq * (nk + 2))
    for start, rows in _chunks(mask, T, S, offset, block_q):
        lo, hi = mask.intervals(rows, S)
        row = (np.arange(len(rows)) // block_q)[:, None] * (nk + 2)
        own = -(-len(rows) // block_q) * (nk + 2)
        part = steps[start // block_q * (nk + 2) :][:own]
        for edge, sign in ((lo, 1), (hi, -1)):
            block, rest = np.divmod(edge, block_k)
            at = (row + block).ravel()
            rest = rest.ravel()
            part += np.bincount(at, sign * (block_k - rest), own)
            part += np.bincount(at + 1, sign * rest, own)
    counts = np.cumsum(steps.reshape(nq, nk + 2), axis=1)[:, :nk]
    return np.rint(counts).astype(np.int64)


def _touched(mask: Mask, T: int, S: int, block_q: int, offset: int) -> int:
    """Keys seen by at least one row of each block of queries, summed over blocks."""
    total = 0
    for start in range(0, T, block_q):
        rows = offset + np.arange(start, min(T, start + block_q))
        lo, hi = mask.intervals(rows, S)
        lo, hi = _union(lo.reshape(1, -1), hi.reshape(1, -1), S)
        total += int((hi - lo).sum())
    return total


# Combinations


@dataclasses.dataclass(frozen=True)
class _Pair(Mask):
    left: Mask
    right: Mask

    @property
    def varies(self) -> bool:
        return self.left.varies or self.right.varies

    @property
    def grain(self) -> int:
        return math.gcd(self.left.grain, self.right.grain)

    def _both_seen(self, i, block, S) -> list:
        parts = (m.seen_blocks(i, block, S) for m in (self.left, self.right))
        return [seen for seen in parts if seen is not None]

    def at_head(self, head: int, heads: int) -> Mask:
        if not self.varies:
            return self
        return type(self)(
            self.left.at_head(head, heads), self.right.at_head(head, heads)
        )


@dataclasses.dataclass(frozen=True)
class And(_Pair):
    """Keys that both masks show."""

    def visible(self, i, j):
        return self.left.visible(i, j) & self.right.visible(i, j)

    def intervals(self, rows, S):
        lo, hi = self.left.intervals(rows, S)
        low, high = self.right.intervals(rows, S)
        lo = np.maximum(lo[:, :, None], low[:, None, :])
        hi = np.minimum(hi[:, :, None], high[:, None, :])
        return _pack(lo.reshape(len(rows), -1), hi.reshape(len(rows), -1), S)

    def seen_blocks(self, i, block, S):
        parts = self._both_seen(i, block, S)
        return min(parts, key=lambda seen: seen.shape[-1], default=None)


@dataclasses.dataclass(frozen=True)
class Or(_Pair):
    """Keys that at least one of the masks shows."""

    def visible(self, i, j):
        return self.left.visible(i, j) | self.right.visible(i, j)

    def intervals(self, rows, S):
        lo, hi = self.left.intervals(rows, S)
        low, high = self.right.intervals(rows, S)
        return _union(np.concatenate([lo, low], 1), np.concatenate([hi, high], 1), S)

    def seen_blocks(self, i, block, S):
        parts = self._both_seen(i, block, S)
        if len(parts) < 2:
            return None
        xp, (seen, more) = _library(i), parts
        twice = (more[..., :, None] == seen[..., None, :]).any(-1)
        return xp.concatenate([seen, xp.where(twice, -1, more)], -1)


@dataclasses.dataclass(frozen=True)
class PerHead(Mask):
    """Equal runs of query heads, one mask each."""

    masks: tuple[Mask, ...]

    @property
    def varies(self) -> bool:
        return True

    def at_head(self, head: int, heads: int) -> Mask:
        if heads % len(self.masks):
            raise ValueError(
                f"per_head with {len(self.masks)} masks: the number of masks must "
                f"divide the {heads} query heads; give one mask per head or head group"
            )
        return self.masks[head * len(self.masks) // heads].at_head(head, heads)


# Leaves


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every key."""

    def visible(self, i, j):
        return (i == i) & (j == j)

    def intervals(self, rows, S):
        return _single(0, S, rows, S)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Keys at or before the query."""

    def visible(self, i, j):
        return j <= i

    def intervals(self, rows, S):
        return _single(0, rows + 1, rows, S)


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """The last `size` keys, the query's own included."""

    size: int

    def visible(self, i, j):
        return (j <= i) & (i - j < self.size)

    def intervals(self, rows, S):
        return _single(rows - self.size + 1, rows + 1, rows, S)

    def seen_blocks(self, i, block, S):
        return _span(i - self.size + 1, i, self.size, block)


@dataclasses.dataclass(frozen=True)
class First(Mask):
    """The first `size` keys of the text (attention sinks, a visible prefix)."""

    size: int

    def visible(self, i, j):
        return (i == i) & (j < self.size)

    def intervals(self, rows, S):
        return _single(0, self.size, rows, S)

    def seen_blocks(self, i, block, S):
        count = -(-min(self.size, S) // block)
        return _library(i).broadcast_to(np.arange(count), (*i.shape, count))


@dataclasses.dataclass(frozen=True)
class Chunk(Mask):
    """Keys in the query's own block, on a grid moved left by `shift`."""

    size: int
    shift: int = 0

    def visible(self, i, j):
        return (i + self.shift) // self.size == (j + self.shift) // self.size

    def intervals(self, rows, S):
        start = (rows + self.shift) // self.size * self.size - self.shift
        return _single(start, start + self.size, rows, S)

    def seen_blocks(self, i, block, S):
        start = (i + self.shift) // self.size * self.size - self.shift
        return _span(start, start + self.size - 1, self.size, block)


@dataclasses.dataclass(frozen=True)
class Group(Mask):
    """Chunks whose grid is shifted for the second half of the query heads."""

    size: int
    shift: int

    @property
    def varies(self) -> bool:
        return True

    def at_head(self, head: int, heads: int) -> Mask:
        if heads < 2:
            raise ValueError(
                f"group with heads={heads}: the shift splits the query heads in two "
                "halves; use at least 2 heads"
            )
        return Chunk(self.size, self.shift if head >= heads // 2 else 0)


@dataclasses.dataclass(frozen=True)
class Strided(Mask):
    """Local blocks and every `stride`-th earlier block, counted from `phase`."""

    block: int
    local: int
    stride: int
    phase: int = 0

    def visible(self, i, j):
        qb, kb = i // self.block, j // self.block
        near = qb - kb < self.local
        return (kb <= qb) & (near | ((kb + self.phase) % self.stride == 0))

    def intervals(self, rows, S):
        qb = rows // self.block
        kb = np.arange(-self.phase % self.stride, -(-S // self.block), self.stride)
        kb = kb[kb <= qb.max(initial=0)]
        far = np.where(kb[None] <= qb[:, None], kb[None] * self.block, S)
        lo = np.concatenate([far, ((qb - self.local + 1) * self.block)[:, None]], 1)
        hi = np.concatenate([far + self.block, ((qb + 1) * self.block)[:, None]], 1)
        return _union(lo, hi, S)

    @property
    def grain(self) -> int:
        return self.block

    def seen_blocks(self, i, block, S):
        if self.block % block:
            raise ValueError(
                f"block={block}: must divide the {self.block} keys of a block of the "
                "mask; use its grain"
            )
        xp, parts = _library(i), self.block // block
        own = i[..., None] // self.block
        near = own - np.arange(self.local)
        far = np.arange(-self.phase % self.stride, -(-S // self.block), self.stride)
        far = xp.where(far <= own - self.local, far, -1)
        seen = xp.concatenate([near, far], -1)[..., None]
        seen = xp.where(seen < 0, -1, seen * parts + np.arange(parts))
        return seen.reshape(*i.shape, -1)


@dataclasses.dataclass(frozen=True)
class BlockSparse(Mask):
    """Local and strided blocks; each kv head strides from a place of its own."""

    block: int
    local: int
    stride: int
    kv_heads: int
    offset: int

    @property
    def varies(self) -> bool:
        return self.kv_heads > 1

    def at_head(self, head: int, heads: int) -> Mask:
        if heads % self.kv_heads:
            raise ValueError(
                f"block_sparse with kv_heads={self.kv_heads}: must divide the {heads} "
                "query heads; pass the model's number of key/value heads"
            )
        step = max(1, self.stride // self.kv_heads)
        phase = head * self.kv_heads // heads * step + self.offset
        return Strided(self.block, self.local, self.stride, phase % self.stride)

    @property
    def grain(self) -> int:
        return self.block

    def visible(self, i, j):
        return self.at_head(0, 1).visible(i, j)

    def intervals(self, rows, S):
        return self.at_head(0, 1).intervals(rows, S)

    def seen_blocks(self, i, block, S):
        return self.at_head(0, 1).seen_blocks(i, block, S)


@dataclasses.dataclass(frozen=True)
class Segments(Mask):
    """Keys of the query's own packed document; nothing past the last document."""

    lengths: tuple[int, ...]

    def _edges(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def visible(self, i, j):
        ends = self._edges()[1:].astype(np.int32)
        xp = _library(i, j)
        own = xp.searchsorted(ends, i, side="right")
        return (own == xp.searchsorted(ends, j, side="right")) & (i < int(ends[-1]))

    def intervals(self, rows, S):
        edges = np.append(self._edges(), np.iinfo(np.int64).max)
        own = np.searchsorted(edges[1:-1], rows, side="right")
        past = own == len(self.lengths)
        return _single(edges[own], np.where(past, 0, edges[own + 1]), rows, S)


@dataclasses.dataclass(frozen=True)
class Blocks(Mask):
    """An explicit list of visible (query block, key block) pairs."""

    block: int
    visited: tuple[tuple[int, int], ...]

    def _table(self) -> np.ndarray:
        """Bool [1 + last query block, 1 + last key block], one blank row and column."""
        size = np.array(self.visited, np.int64).reshape(-1, 2).max(0, initial=-1) + 2
        table = np.zeros(size, bool)
        for q, k in self.visited:
            table[q, k] = True
        return table

    def visible(self, i, j):
        table = self._table()
        xp = _library(i, j)
        rows = xp.minimum(i // self.block, table.shape[0] - 1)
        columns = xp.minimum(j // self.block, table.shape[1] - 1)
        return xp.asarray(table)[rows, columns]

    def intervals(self, rows, S):
        table = self._table()
        seen = table[np.minimum(rows // self.block, table.shape[0] - 1)]
        lo = np.where(seen, np.arange(table.shape[1]) * self.block, S)
        return _pack(lo, lo + self.block, S)


@dataclasses.dataclass(frozen=True)
class Laid(Mask):
    """A mask of a text of which rows and columns are pieces of `size` in any order.

    `rows` and `columns` are where in the text each piece starts.
    """

    mask: Mask
    size: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def varies(self) -> bool:
        return self.mask.varies

    def at_head(self, head: int, heads: int) -> Mask:
        return dataclasses.replace(self, mask=self.mask.at_head(head, heads))

    def _place(self, x, starts):
        """Where in the text index `x` is."""
        xp = _library(x)
        shift = starts[0]
        for n, start in enumerate(starts[1:], 1):
            shift = xp.where(x >= n * self.size, start - n * self.size, shift)
        return x + shift

    def visible(self, i, j):
        return self.mask.visible(
            self._place(i, self.rows), self._place(j, self.columns)
        )

    def intervals(self, rows, S):
        end = max(self.columns) + self.size
        lo, hi = self.mask.intervals(self._place(rows, self.rows), end)
        pieces = [
            [np.clip(edge - start, 0, self.size) + n * self.size for edge in (lo, hi)]
            for n, start in enumerate(self.columns)
        ]
        low, high = (np.concatenate(edges, 1) for edges in zip(*pieces, strict=True))
        return _pack(low, high, S)


# Constructors


def full() -> Mask:
    """Every query sees every key."""
    return Full()


def causal() -> Mask:
    """Query i sees keys j <= i."""
    return Causal()


def window(w: int) -> Mask:
    """Query i sees the last `w` keys, itself included: 0 <= i - j < w."""
    _require("window", w, 1, "a window counts the query itself, so 1 is the least")
    return Window(int(w))


def sink(s: int) -> Mask:
    """Every query sees keys j < s; use `causal() & (window(w) | sink(s))`."""
    _require("sink", s, 0, "give the number of first tokens that stay visible")
    return First(int(s))


def prefix(n: int) -> Mask:
    """Every query sees keys j < n; prefix-LM is `causal() | prefix(n)`."""
    _require("prefix", n, 0, "give the number of tokens seen in both directions")
    return First(int(n))


def chunk(c: int) -> Mask:
    """Query and key lie in the same block of `c` positions."""
    _require("chunk", c, 1, "give the number of positions per chunk")
    return Chunk(int(c))


def group(g: int, shift: int | None = None) -> Mask:
    """S2-Attn groups of `g`, moved by `shift` (g/2) in the second half of the heads.

    Position p of a shifted head belongs to group (p + shift) // g, so its first
    and last groups are short and nothing wraps (LongLoRA, arXiv 2309.12307). Of an odd
    number of heads the smaller half is not shifted.
    """
    _require("group", g, 1, "give the number of positions per group")
    shift = g // 2 if shift is None else shift
    _require("shift", shift, 0, "0 leaves all heads on one grid, g // 2 is the paper's")
    return Group(int(g), int(shift) % int(g))


def block_sparse(
    block: int, local: int, stride: int, *, kv_heads: int = 1, offset: int = 0
) -> Mask:
    """Block pairs with qb - kb < local or (kb + h * step + offset) % stride == 0.

    Blocks after the query's are hidden; `h` is the kv head and
    step = max(1, stride // kv_heads), so kv heads see different stripes, whose place
    does not move with the query (LongGen, arXiv 2410.01485; S2-Attention,
    arXiv 2407.17678). Combine with `causal()`. A key that is on no stripe of its kv
    head is hidden from all queries once it is `local` blocks back.
    """
    _require("block", block, 1, "give the number of positions per block")
    _require("local", local, 1, "the query's own block is always kept")
    _require("stride", stride, 1, "1 keeps every earlier block")
    _require("kv_heads", kv_heads, 1, "1 gives all heads the same stripes")
    _require("offset", offset, 0, "give the first stripe as a block index")
    return BlockSparse(int(block), int(local), int(stride), int(kv_heads), int(offset))


def segments(lengths: Iterable[int]) -> Mask:
    """Packed documents of these lengths; positions past their sum see nothing."""
    lengths = tuple(lengths)
    if not lengths:
        raise ValueError("lengths=(): needs at least one document; give its length")
    for length in lengths:
        _require("document length", length, 1, "leave empty documents out")
    return Segments(tuple(int(n) for n in lengths))


def blocks(block: int, visited: Iterable[tuple[int, int]]) -> Mask:
    """Exactly these (query block, key block) pairs of `block` positions a side."""
    _require("block", block, 1, "give the number of positions per block")
    pairs = sorted({(q, k) for q, k in visited})
    for q, k in pairs:
        _require("query block", q, 0, "blocks are counted from 0")
        _require("key block", k, 0, "blocks are counted from 0")
    return Blocks(int(block), tuple((int(q), int(k)) for q, k in pairs))


def per_head(masks: Sequence[Mask]) -> Mask:
    """One mask per query head, or per equal run of query heads."""
    masks = tuple(masks)
    if not masks or not all(isinstance(m, Mask) for m in masks):
        raise ValueError(
            f"masks={masks!r}: needs at least one mask and nothing else; build each "
            "with a constructor of this module"
        )
    return PerHead(masks)


def laid(mask: Mask, size: int, rows: Sequence[int], columns: Sequence[int]) -> Mask:
    """`mask` for queries and keys that are pieces of `size` positions of a text.

    `rows` and `columns` are the starts of the pieces, in the order they lie in.
    """
    _require("size", size, 1, "give the number of positions of a piece")
    for start in (*rows, *columns):
        _require("start", start, 0, "pieces are counted from the start of the text")
    if not rows or not columns:
        raise ValueError("rows and columns: need at least one piece each")
    return Laid(mask, int(size), tuple(map(int, rows)), tuple(map(int, columns)))
