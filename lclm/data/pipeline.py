"""From a data description to batches, in an order that depends on nothing but it."""

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from lclm.data import sources
from lclm.data.batch import make_batch
from lclm.data.documents import SYNTHETIC, check, kind_of, read_documents
from lclm.data.packing import PACKINGS, plan_rows
from lclm.data.rows import Documents, InMemory, Packed, Row
from lclm.data.store import UNDECODABLE, Observe, open_store
from lclm.data.synthetic import Haystack, haystack
from lclm.data.tokens import text_hash, tokenise
from lclm.errors import LclmError, unknown
from lclm.typing import Batch

PREFETCHED = 3
THREADS = 2


@dataclass(frozen=True)
class Part:
    """One source of a mixture: `share` of the rows, relative to the other parts.

    Only documents of `shortest` to `longest` tokens are taken; `cut` first cuts them
    into documents of at most that many tokens.
    """

    source: str
    share: float = 1.0
    shortest: int = 0
    longest: int | None = None
    cut: int | None = None

    def __post_init__(self):
        if not (math.isfinite(self.share) and self.share >= 0):
            raise LclmError(
                f"data: the share of {self.source!r} is {self.share}; it must be a "
                "number of at least 0"
            )
        longest = math.inf if self.longest is None else self.longest
        if self.shortest < 0 or longest < max(self.shortest, 2):
            raise LclmError(
                f"data: {self.source!r} takes documents of {self.shortest} to "
                f"{self.longest} tokens: none; give 0 <= shortest <= longest"
            )
        if self.cut is not None and self.cut < 2:
            raise LclmError(f"data: cut is {self.cut} tokens; at least 2, or None")


@dataclass(frozen=True)
class DataSpec:
    """Where tokens come from: one `source`, or a `mixture` of them.

    packing: how documents share rows (`lclm.data.packing`). held_out: sources whose
    documents are left out of every part, by the hash of their text. undecodable: what
    a document that cannot be read is, "fatal" or a thing to "skip" (and count). folder:
    where tokens are kept, `tokens` in the cache where empty. lengths: rows of these
    lengths in turn, in drawn order, instead of the run's one; a length that stands
    twice comes twice as often.
    """

    source: str = ""
    mixture: tuple[Part, ...] = ()
    packing: str = "best_fit"
    lengths: tuple[int, ...] = ()
    held_out: tuple[str, ...] = ()
    undecodable: str = "fatal"
    folder: str = ""

    def __post_init__(self):
        if bool(self.source) == bool(self.mixture):
            raise LclmError(
                "data: give either source='kjv' or a mixture of parts, "
                f"not {'both' if self.source else 'neither'}"
            )
        if self.packing not in PACKINGS:
            raise unknown("packing", self.packing, PACKINGS)
        if not sum(part.share for part in self.parts) > 0:
            raise LclmError(
                f"data: the shares of the {len(self.parts)} parts add up to zero; give "
                "at least one part a share above 0"
            )
        if self.undecodable not in UNDECODABLE:
            raise unknown("undecodable", self.undecodable, UNDECODABLE)
        for source in (*(part.source for part in self.parts), *self.held_out):
            check(source)
        if any(length < 1 for length in self.lengths):
            raise LclmError(f"data: lengths {self.lengths}: at least 1 token each")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The mixture, of one part where there is one source."""
        return self.mixture or (Part(self.source),)


@runtime_checkable
class Batches(Protocol):
    """Endless batches that can say where they are, and go on from there."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """A JSON-able place between two batches."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a place that `get_state` gave."""
        ...


def open_batches(
    spec: DataSpec,
    tokenizer: Any,
    *,
    batch: int,
    length: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
) -> Batches:
    """Batches of `batch` rows of `length` tokens, read ahead by threads.

    tokenizer: anything with `encode(text) -> ids`. process: index and number of the
    processes that read this run; each one reads only its own `batch / number` rows of
    every batch, in the order that `jax.make_array_from_process_local_data` joins them.

    Raises:
      LclmError: a batch that does not split, a source without rows.
    """
    if batch % process[1]:
        raise LclmError(
            f"batch {batch} does not split over {process[1]} processes: make it a "
            "multiple of their number"
        )
    lengths = spec.lengths or (length,)
    if max(lengths) > length:
        raise LclmError(
            f"data.lengths has {max(lengths)} tokens, more than length={length}: raise "
            "length to the longest of them"
        )
    parts = [part for part in spec.parts if part.share > 0]
    opened = [open_documents(spec, part.source, tokenizer) for part in parts]
    held = held_out(spec, opened)
    mixed, told = {}, [seed, batch, list(lengths)]
    for size in sorted(set(lengths)):
        rows = [
            rows_of(spec, part, documents, length=size, seed=seed, held=held)
            for part, documents in zip(parts, opened, strict=True)
        ]
        mixed[size] = mix(rows, [part.share for part in parts], seed=seed)
        told += [[p.source, p.share, len(r)] for p, r in zip(parts, rows, strict=True)]
    name = hashlib.sha256(repr(told).encode()).hexdigest()[:12]
    schedule = Schedule(tuple(lengths), batch, seed)
    return Stream(mixed, schedule, process=process, name=name)


def mix(
    rows: Sequence[Sequence[Row]], shares: Sequence[float], *, seed: int
) -> grain.MapDataset:
    """Endless rows by number: every prefix holds the shares, each epoch drawn anew."""
    seeds = np.random.SeedSequence(seed).generate_state(len(rows))
    endless = [
        grain.MapDataset.source(part).shuffle(seed=int(s)).repeat()
        for part, s in zip(rows, seeds, strict=True)
    ]
    if len(endless) == 1:
        return endless[0]
    return grain.MapDataset.mix(endless, weights=[s / sum(shares) for s in shares])


@dataclass(frozen=True)
class Schedule:
    """Which rows make a step's batch: a cycle holds each of `lengths` once."""

    lengths: tuple[int, ...]
    batch: int
    seed: int

    def at(self, step: int) -> tuple[int, int]:
        """Row length of a step, and the number of its first row among those rows."""
        cycle, slot = divmod(step, len(self.lengths))
        rng = np.random.default_rng((self.seed, cycle))
        drawn = [self.lengths[i] for i in rng.permutation(len(self.lengths))]
        length = drawn[slot]
        before = cycle * drawn.count(length) + drawn[:slot].count(length)
        return length, before * self.batch


class Stream(Iterator):
    """Batches as a function of their number, made ahead in the background."""

    def __init__(
        self,
        mixed: dict[int, grain.MapDataset],
        schedule: Schedule,
        *,
        process: tuple[int, int],
        name: str,
    ):
        self._mixed, self._schedule, self._name = mixed, schedule, name
        self._index, self._count = process
        steps = grain.MapDataset.range(sys.maxsize).map(self.batch_at)
        ahead = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCHED)
        self._batches = iter(steps.to_iter_dataset(ahead))

    def batch_at(self, step: int) -> Batch:
        """This process's rows of the batch of one step."""
        length, first = self._schedule.at(step)
        own = self._schedule.batch // self._count
        start = first + self._index * own
        rows = [self._mixed[length][start + i] for i in range(own)]
        return make_batch(*(np.stack([r[key] for r in rows]) for key in _KEYS))

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch, and of what data it is."""
        return {"batch": self._batches.get_state()["next_index"], "data": self._name}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with that batch; any number of processes may.

        Raises:
          LclmError: the state is of other data, another seed, batch or length.
        """
        if state.get("data") != self._name:
            raise LclmError(
                f"the place {state} belongs to other data than this run's "
                f"({self._name}): sources, shares, lengths, batch and seed must be the "
                "same to go on in the middle; start the data anew, or restore them"
            )
        self._batches.set_state({"next_index": int(state["batch"])})


_KEYS = ("tokens", "segments", "mask")


def open_documents(
    spec: DataSpec, source: str, tokenizer: Any, observe: Observe | None = None
) -> Documents:
    """A source's tokens: a single text in memory, documents from their store."""
    kind = kind_of(source)
    if kind == "synthetic":
        load, options = sources.bind(SYNTHETIC, source)
        return haystack(load(**options), tokenizer)
    if kind == "documents":
        return open_store(
            source,
            tokenizer,
            undecodable=spec.undecodable,
            root=spec.folder,
            observe=observe,
        )
    (document,) = read_documents(source)
    tokens, mask = tokenise(document, tokenizer)
    return InMemory([tokens], [mask], [text_hash(document.text)])


def held_out(spec: DataSpec, opened: Sequence[Documents]) -> np.ndarray:
    """Hashes of the texts to leave out.

    Raises:
      LclmError: a held-out source has no document in common with any part.
    """
    known = np.concatenate([documents.hashes for documents in opened])
    found = [np.zeros(0, np.uint64)]
    for source in spec.held_out:
        texts = [d.text for d in read_documents(source) if d.text is not None]
        hashes = np.array([text_hash(text) for text in texts], np.uint64)
        if not np.isin(hashes, known).any():
            raise LclmError(
                f"data.held_out: no document of {source!r} is in the mixture as a "
                "document, so that nothing would be held out; cut both alike, or leave "
                "it out of held_out"
            )
        found.append(hashes)
    return np.concatenate(found)


def rows_of(
    spec: DataSpec,
    part: Part,
    documents: Documents,
    *,
    length: int,
    seed: int,
    held: np.ndarray,
) -> Sequence[Row]:
    """The rows of one part, without what is held out."""
    sizes = documents.lengths
    longest = math.inf if part.longest is None else part.longest
    fits = (sizes >= part.shortest) & (sizes <= longest)
    docs = np.flatnonzero(fits & ~np.isin(documents.hashes, held))
    if isinstance(documents, Haystack):
        return documents.rows(length, seed=seed, docs=docs)
    plan = plan_rows(
        sizes, length, packing=spec.packing, seed=seed, docs=docs, cut=part.cut
    )
    if not len(plan):
        raise LclmError(
            f"data: {part.source!r} has no row: of {len(sizes)} documents with "
            f"{int(sizes.sum())} tokens none of {part.shortest} to {part.longest} "
            "tokens is left; give more text, or other bounds"
        )
    return Packed(documents, plan)
