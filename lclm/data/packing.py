"""Documents into rows: which pieces of which documents share a row.

A row of `length` inputs holds `length + 1` tokens, the last one only as a target. A
plan is made from the documents' lengths alone, before any of them is read, so that row
i can be built without the rows before it: any process can read its own rows, and going
on in the middle of an epoch needs one number.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from lclm.errors import LclmError, unknown

OPEN_ROWS = 64


@dataclass(frozen=True)
class Plan:
    """Rows as runs of spans: row r holds spans `bounds[r]` to `bounds[r + 1]`.

    A span is `count` tokens of document `doc` from token `start` on.
    """

    length: int
    bounds: Int[np.ndarray, "borders"]
    doc: Int[np.ndarray, "spans"]
    start: Int[np.ndarray, "spans"]
    count: Int[np.ndarray, "spans"]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def spans(self, row: int) -> list[tuple[int, int, int]]:
        """(document, first token, tokens) of a row."""
        at = slice(self.bounds[row], self.bounds[row + 1])
        columns = (self.doc[at], self.start[at], self.count[at])
        return list(zip(*(c.tolist() for c in columns), strict=True))

    @property
    def fill(self) -> float:
        """The share of places in rows that hold a token."""
        return float(self.count.sum()) / max(len(self) * (self.length + 1), 1)


@dataclass(frozen=True)
class Pieces:
    """Parts of documents, in an order."""

    doc: Int[np.ndarray, "pieces"]
    start: Int[np.ndarray, "pieces"]
    count: Int[np.ndarray, "pieces"]

    def __getitem__(self, index: np.ndarray) -> "Pieces":
        return Pieces(self.doc[index], self.start[index], self.count[index])


def plan_rows(
    lengths: np.ndarray,
    length: int,
    *,
    packing: str,
    seed: int,
    docs: np.ndarray | None = None,
    cut: int | None = None,
) -> Plan:
    """Rows of `length` inputs over documents of `lengths` tokens, each one used once.

    docs: the documents to take (all). cut: documents are first cut into pieces of at
    most that many tokens, each one a document from there on.

    "best_fit" cuts what is longer than a row into whole rows and puts the rest, longest
    first, where the least space stays free (arXiv 2404.10830); "first_fit" does so in
    drawn order into the first of 64 open rows with space; "concat" is one stream cut
    at every row's end. In all of them each token but the first of a document is a
    target exactly once.
    """
    if packing not in PACKINGS:
        raise unknown("packing", packing, PACKINGS)
    if length < 1 or (cut is not None and cut < 2):
        raise LclmError(f"row length {length} and cut {cut}: at least 1 and 2 tokens")
    docs = np.arange(len(lengths)) if docs is None else np.asarray(docs)
    sizes = np.asarray(lengths, np.int64)[docs]
    whole = Pieces(docs.astype(np.int64), np.zeros_like(sizes), sizes)
    if cut is not None:
        whole = _windows(whole, cut, overlap=0)
    whole = whole[whole.count >= 2]
    rng = np.random.default_rng((seed, length))
    whole = whole[rng.permutation(len(whole.count))]
    return PACKINGS[packing](whole, length)


def _windows(pieces: Pieces, stride: int, *, overlap: int) -> Pieces:
    """Each piece as windows of `stride + overlap` tokens, `stride` apart."""
    parts = np.maximum(-(-(pieces.count - overlap) // stride), 1)
    owner = np.repeat(np.arange(len(parts)), parts)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
    left = pieces.count[owner] - index * stride
    start = pieces.start[owner] + index * stride
    return Pieces(pieces.doc[owner], start, np.minimum(left, stride + overlap))


def _concat(pieces: Pieces, length: int) -> Plan:
    ends = np.cumsum(pieces.count)
    total = int(ends[-1]) if len(ends) else 0
    rows = -(-(total - 1) // length) if total > 1 else 0
    low = np.arange(rows) * length
    high = np.minimum(low + length + 1, total)
    first = np.searchsorted(ends, low, side="right")
    last = np.searchsorted(ends, high, side="left")
    spans = last - first + 1
    row = np.repeat(np.arange(rows), spans)
    inside = np.arange(len(row)) - np.repeat(np.cumsum(spans) - spans, spans)
    piece = first[row] + inside
    begin = ends[piece] - pieces.count[piece]
    a, b = np.maximum(begin, low[row]), np.minimum(ends[piece], high[row])
    bounds = np.concatenate([[0], np.cumsum(spans)])
    start = pieces.start[piece] + a - begin
    return Plan(length, bounds, pieces.doc[piece], start, b - a)


def _best_fit(pieces: Pieces, length: int) -> Plan:
    parts = _windows(pieces, length, overlap=1)
    parts = parts[np.argsort(-parts.count, kind="stable")]
    sizes = parts.count.tolist()
    row_of, rows = np.empty(len(sizes), np.int64), 0
    free: list[int] = []  # distinct free spaces, sorted
    having: dict[int, list[int]] = {}  # free space -> rows that have it

    def put(row: int, space: int) -> None:
        if space < 2:
            return
        if not having.setdefault(space, []):
            bisect.insort(free, space)
        having[space].append(row)

    for i, size in enumerate(sizes):
        at = bisect.bisect_left(free, size)
        if at == len(free):
            row, space, rows = rows, length + 1, rows + 1
        else:
            space = free[at]
            row = having[space].pop()
            if not having[space]:
                del free[at]
        row_of[i] = row
        put(row, space - size)
    return _grouped(parts, row_of, rows, length)


def _first_fit(pieces: Pieces, length: int) -> Plan:
    parts = _windows(pieces, length, overlap=1)
    row_of, rows = np.empty(len(parts.count), np.int64), 0
    open_rows: dict[int, int] = {}  # row -> free space, oldest first
    for i, size in enumerate(parts.count.tolist()):
        row = next((r for r, space in open_rows.items() if space >= size), -1)
        if row < 0:
            row, rows = rows, rows + 1
            if len(open_rows) == OPEN_ROWS:
                del open_rows[min(open_rows, key=open_rows.__getitem__)]
            open_rows[row] = length + 1
        open_rows[row] -= size
        row_of[i] = row
    return _grouped(parts, row_of, rows, length)


def _grouped(parts: Pieces, row_of: np.ndarray, rows: int, length: int) -> Plan:
    order = np.argsort(row_of, kind="stable")
    parts = parts[order]
    bounds = np.searchsorted(row_of[order], np.arange(rows + 1))
    return Plan(length, bounds, parts.doc, parts.start, parts.count)


PACKINGS: dict[str, Callable[[Pieces, int], Plan]] = {
    "best_fit": _best_fit,
    "first_fit": _first_fit,
    "concat": _concat,
}
