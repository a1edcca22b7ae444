"""Perplexity of one text under several caches: the same tokens, one row per cache."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from lclm.data.haystack import encode_prefix
from lclm.data.sources import read
from lclm.evals import figures
from lclm.evals.base import (
    Journal,
    LanguageModel,
    Observe,
    Panel,
    Record,
    Summary,
    by_model,
    require,
    row_name,
    show,
    show_bytes,
    silent,
    to_csv,
)
from lclm.evals.curves import buckets, even_edges, log_edges
from lclm.evals.key_tokens import KeyTokens
from lclm.evals.sliding import check_window, exp, slide

LOG2 = math.log(2.0)


@dataclass(frozen=True)
class Reading:
    """One way to read the text: a cache policy, and how far to go with it.

    With `window` and `stride` every window is read afresh and scores the tokens that
    no earlier window scored (sliding evaluation); else the text is read once through.
    `opening`: pieces of a token each that stand in place of the text's first tokens.
    """

    cache: str = "full"
    label: str = ""
    length: int | None = None
    chunk: int = 512
    window: int | None = None
    stride: int | None = None
    opening: tuple[str, ...] = ()

    def __post_init__(self):
        require(
            (self.window is None) == (self.stride is None),
            f"window is {self.window} and stride is {self.stride}: sliding evaluation "
            "needs both, reading once through needs neither",
        )
        require(self.chunk >= 1, f"chunk is {self.chunk}; it must be at least 1 token")
        require(
            self.length is None or self.length >= 2,
            f"length is {self.length}; at least 2 tokens are needed for one loss",
        )
        if self.window is not None:
            check_window(self.window, self.stride)

    @property
    def name(self) -> str:
        """The cache column of records."""
        name = self.cache
        if self.window is not None:
            name = f"sliding({name}):window={self.window},stride={self.stride}"
        return f"{name} after {''.join(self.opening)!r}" if self.opening else name

    @property
    def title(self) -> str:
        """What tables and figures call it."""
        return self.label or self.name

    def opened(
        self, tokens: Int[np.ndarray, "1 length"], encode: Callable[[str], list[int]]
    ) -> Int[np.ndarray, "1 length"]:
        """The tokens behind this reading's opening."""
        ids = [encode(piece) for piece in self.opening]
        for piece, found in zip(self.opening, ids, strict=True):
            require(
                len(found) == 1,
                f"opening has {piece!r}, which is {len(found)} tokens of this model: "
                "give pieces of one token each",
            )
        count = len(ids)
        require(
            count < tokens.shape[1],
            f"an opening of {count} tokens and a text of {tokens.shape[1]}: at most "
            "all but one can be replaced",
        )
        new = np.asarray(ids, np.int32).reshape(1, count)
        return np.concatenate([new, tokens[:, count:]], axis=1)


@dataclass(frozen=True)
class Perplexity:
    """Loss of `documents` pieces of `length` tokens of `source`, for each reading.

    A model that wants a start token gets it as the first of the `length` tokens.
    `splits` are the positions where the table's columns part (8192: before and past
    8k); `bucket` is the width in tokens of the points of the figure. `keys`: every
    reading also tells LongPPL, its perplexity of the tokens that need the long context.
    """

    readings: tuple[Reading, ...] = (Reading(),)
    source: str = "kjv"
    length: int = 4096
    documents: int = 1
    splits: tuple[int, ...] = ()
    bucket: int = 256
    keys: KeyTokens | None = None

    SCOPE: ClassVar = ("source", "length", "documents", "splits", "bucket")

    def __post_init__(self):
        require(self.length >= 2, f"length is {self.length}; at least 2 tokens")
        require(self.documents >= 1, f"documents is {self.documents}; at least 1")
        require(self.bucket >= 1, f"bucket is {self.bucket}; at least 1 token")
        require(bool(self.readings), "readings is empty: give at least one cache")
        require(
            all(a < b for a, b in zip((0, *self.splits), self.splits, strict=False)),
            f"splits {self.splits} must be positive and increasing",
        )
        names = [r.name for r in self.readings]
        require(len(set(names)) == len(names), f"readings name a cache twice: {names}")

    def run(
        self, lm: LanguageModel, *, journal: Journal, observe: Observe = silent
    ) -> list[Record]:
        """Read every document with every reading not yet in the journal."""
        records, pieces = [], None
        for reading in self.readings:
            length = min(reading.length or self.length, self.length)
            for document in range(self.documents):
                key = self._key("perplexity", length, document, reading.name)
                record = journal.find(**key)
                if record is None:
                    pieces = self.pieces(lm) if pieces is None else pieces
                    piece = pieces[document : document + 1]
                    chosen = self._chosen(lm, document, piece, journal, observe)
                    tokens = reading.opened(piece[:, :length], lm.tokenizer.encode)
                    found = self._measure(lm, reading, tokens, chosen, observe)
                    record = journal.add({**key, **found})
                records.append(record)
        return records

    def _key(self, task: str, length: int, document: int, cache: str) -> Record:
        key = dict(task=task, length=length, depth=None, seed=document, cache=cache)
        return key if self.keys is None else {**key, "strategy": self.keys.name}

    def _chosen(
        self,
        lm: LanguageModel,
        document: int,
        tokens: np.ndarray,
        journal: Journal,
        observe: Observe,
    ) -> list[int] | None:
        """Positions of a document's key tokens; None where nobody asks for them."""
        if self.keys is None:
            return None
        key = self._key("key_tokens", self.length, document, "full")
        record = journal.find(**key)
        if record is None:

            def progress(done: int) -> None:
                observe("key tokens", done, self.length)

            found = self.keys.find(lm.nll, tokens, progress).tolist()
            record = journal.add({**key, "positions": found})
        return record["positions"]

    def pieces(self, lm: LanguageModel) -> Int[np.ndarray, "documents length"]:
        """The token ids of every document, consecutive pieces of the source."""
        start = np.asarray(lm.encode(""), np.int32)
        body = self.length - len(start)
        count = body * self.documents
        ids = encode_prefix(lm.tokenizer.encode, read(self.source), count=count)
        require(
            len(ids) >= count,
            f"{self.documents} x {body} tokens wanted, but source {self.source!r} has "
            f"{len(ids)}; use a shorter length, fewer documents or a longer text",
        )
        pieces = np.asarray(ids, np.int32).reshape(self.documents, body)
        starts = np.tile(start, (self.documents, 1))
        return np.concatenate([starts, pieces], axis=1)

    def _measure(
        self,
        lm: LanguageModel,
        reading: Reading,
        tokens: np.ndarray,
        chosen: list[int] | None,
        observe: Observe,
    ) -> Record:
        length = tokens.shape[1]
        pace = Pace()

        def progress(done: int) -> None:
            pace.tick(done)
            observe(reading.title, done, length)

        observe(reading.title, 0, length)
        options = dict(cache=reading.cache, chunk=reading.chunk)
        extra: Record = {}
        if reading.window is None:
            nll = np.asarray(lm.nll(tokens, **options, progress=progress))
            seen = length
        else:
            sliding = slide(
                lambda t: lm.nll(t, **options),
                tokens,
                window=reading.window,
                stride=reading.stride,
                progress=progress,
            )
            nll, seen = sliding.nll, reading.window
            extra = {"yarn_perplexity": sliding.perplexity("yarn")}
        observe(reading.title, length, length)
        finite = np.isfinite(nll[0])
        require(
            bool(finite.all()),
            f"the loss at position {int(finite.argmin()) + 1} under cache "
            f"{reading.cache!r} is not finite: the weights or their precision are at "
            "fault; try dtype float32",
        )
        if chosen is not None:
            of = nll[0, [p - 1 for p in chosen if p < length]]
            extra |= {"key_nll": float(of.mean()) if of.size else None}
            extra |= {"key_tokens": int(of.size)}
        text = lm.tokenizer.decode([int(t) for t in tokens[0, 1:]])
        return {
            **score(nll, text),
            **extra,
            "segments": [b.row() for b in buckets(nll, self._edges(length))],
            "curve": [b.row() for b in buckets(nll, even_edges(length, self.bucket))],
            "log_curve": [b.row() for b in buckets(nll, log_edges(length))],
            "cache_bytes": lm.cache_bytes(reading.cache, seen),
            "tokens_per_second": pace.rate(),
            "seconds": pace.seconds(),
            "title": reading.title,
        }

    def _edges(self, length: int) -> list[int]:
        return [0, *(s for s in self.splits if s < length), length]

    def summary(self, records: Sequence[Record], *, trained: int) -> Summary:
        """One row and one curve per model and reading, means over documents."""
        edges = [0, *self.splits, max(self.length, *self.splits, 0)]
        spans = [s for s in itertools.pairwise(edges) if s[0] < s[1]]
        rows, curves = [], {}
        models = by_model(records)
        for (model, its), reading in itertools.product(models.items(), self.readings):
            mine = [r for r in its if r["cache"] == reading.name]
            if mine:
                name = row_name(model, reading.title, len(self.readings))
                more = () if self.keys is None else (_long_ppl(mine),)
                rows.append((*_row(name, mine, spans), *more))
                curves[name] = _mean_curve([r["curve"] for r in mine])
        first = "cache" if set(models) <= {""} else "model"
        columns = (
            first,
            "tokens",
            *(f"ppl {_short(a)}-{_short(b)}" for a, b in spans),
            "bits/byte",
            "peak cache",
            "tokens/s",
            *(() if self.keys is None else ("LongPPL",)),
        )
        note = (
            f"{self.documents} x {self.length:,} tokens of {self.source}; ppl is "
            "perplexity at those positions; tokens/s leaves out the first chunk, which "
            "compiles."
        )
        if self.keys is not None:
            note += (
                f" LongPPL: of the tokens (in brackets) that full attention predicts "
                f"{self.keys.gain} nats better than a context of {self.keys.short:,}."
            )
        panel = Panel(f"Perplexity by {first}", columns, tuple(rows), note)
        header = (first, "bucket_start", "bucket_end", "nll", "count", "low", "high")
        lines = [(title, *point) for title, c in curves.items() for point in c]
        pictures = {}
        if curves:
            drawn = figures.loss_by_position(curves, trained=trained)
            pictures["loss_by_position.png"] = drawn
        csv = {"loss_by_position.csv": to_csv(header, lines)}
        return Summary((panel,), pictures, csv)


def score(nll: Float[np.ndarray, "documents targets"], text: str) -> Record:
    """Mean loss of the scored `text`, per token, per UTF-8 byte and per word."""
    total = float(np.sum(nll, dtype=np.float64))
    size, words = len(text.encode()), len(text.split())
    mean = total / nll.size
    return {
        "nll": mean,
        "perplexity": exp(mean),
        "bits_per_byte": total / LOG2 / max(size, 1),
        "word_perplexity": exp(total / max(words, 1)),
        "tokens": int(nll.size),
        "bytes": size,
        "words": words,
    }


class Pace:
    """Wall time of a reading; the rate starts after the first chunk, which compiles."""

    def __init__(self):
        self._start = time.perf_counter()
        self._ticks: list[tuple[float, int]] = []

    def tick(self, done: int) -> None:
        """`done` tokens are finished now."""
        self._ticks.append((time.perf_counter(), done))

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def rate(self) -> float | None:
        """Tokens a second after the first tick, overall if there was only one."""
        if not self._ticks:
            return None
        (first, before), (last, done) = self._ticks[0], self._ticks[-1]
        if done > before and last > first:
            return (done - before) / (last - first)
        return done / max(last - self._start, 1e-9)


def _row(title: str, records: list[Record], spans: list) -> tuple[str, ...]:
    def mean(name: str) -> float | None:
        values = [r[name] for r in records]
        return None if None in values else sum(values) / len(values)

    cells = []
    for start, end in spans:
        parts = [s for r in records for s in r["segments"] if s[0] == start]
        total, count = sum(p[2] * p[3] for p in parts), sum(p[3] for p in parts)
        reached = max((p[1] for p in parts), default=0)
        mark = "" if reached >= end else f" (to {_short(reached)})"
        cells.append(show(exp(total / count)) + mark if count else "-")
    return (
        title,
        f"{max(r['length'] for r in records):,}",
        *cells,
        show(mean("bits_per_byte"), ".3f"),
        show_bytes(max(r["cache_bytes"] for r in records)),
        show(mean("tokens_per_second"), ",.0f"),
    )


def _long_ppl(records: list[Record]) -> str:
    """Perplexity of the key tokens of all documents, and how many they are."""
    parts = [(r["key_nll"], r["key_tokens"]) for r in records if r["key_tokens"]]
    count = sum(n for _, n in parts)
    if not count:
        return "- (0)"
    return f"{show(exp(sum(nll * n for nll, n in parts) / count))} ({count:,})"


def _mean_curve(curves: list[list]) -> list[list[float | int]]:
    """Documents of one length, averaged point by point."""
    stacked = np.asarray(curves, np.float64)
    mean = stacked.mean(axis=0)
    mean[:, 3] = stacked[:, :, 3].sum(axis=0)
    return [[int(a), int(b), n, int(c), lo, hi] for a, b, n, c, lo, hi in mean.tolist()]


def _short(position: int) -> str:
    """8192 -> 8k; 1000 -> 1000."""
    whole = position and position % 1024 == 0
    return f"{position // 1024}k" if whole else f"{position}"
