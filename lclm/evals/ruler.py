"""RULER (arXiv 2404.06654): 13 tasks over lengths, and the length that still counts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from lclm.data.haystack import fit
from lclm.data.sources import check, read
from lclm.errors import unknown
from lclm.evals import figures, metrics
from lclm.evals.asking import NOTES
from lclm.evals.base import (
    Example,
    Panel,
    Query,
    Record,
    Summary,
    Tokenizer,
    require,
    show,
    to_csv,
)
from lclm.evals.exam import Examination, Item, mean, ways
from lclm.evals.ruler_tasks import TASKS, Sample, Source

PASS = 85.6  # Llama-2-7B at 4K


def make(
    tokenizer: Tokenizer, task: str, sample: Sample, *, starts: int = 0
) -> Example:
    """A prompt that with its answer takes at most `length` tokens, less than a unit
    below; `starts` tokens (BOS) that the model adds by itself are counted in.

    Raises:
      LclmError: not even the bare task fits.
    """
    build = TASKS[task](sample)
    bare = build(0)
    new = bare.query.max_new_tokens

    def size(units: int) -> int:
        made = build(units)
        if made is None:
            return sample.length + 1
        return starts + len(tokenizer.encode(made.prompt)) + new

    few, many = size(0), size(64)
    unit = max((many - few) / 64, 0.05) if many > few else 1.0
    count = fit(size, sample.length, guess=int((sample.length - few) / unit))
    found = build(count)
    return replace(found, meta={"ruler": task, "units": count, "total": size(count)})


@dataclass(frozen=True)
class Ruler(Examination):
    """Scores of `samples` questions a task and length; lengths include the answer.

    The effective length is the longest whose mean over the tasks is above `threshold`
    percent. source: the text of essays and words.
    """

    lengths: tuple[int, ...] = (4096, 8192)
    tasks: tuple[str, ...] = tuple(TASKS)
    samples: int = 5
    source: str = "kjv"
    threshold: float = PASS
    seed: int = 42

    task: ClassVar = "ruler"
    SCOPE: ClassVar = ("source", "budget", "chat")

    def __post_init__(self):
        require(bool(self.lengths), "lengths is empty: give at least one, in tokens")
        require(bool(self.tasks), "tasks is empty: give at least one")
        for task in self.tasks:
            if task not in TASKS:
                raise unknown("RULER task", task, TASKS)
        require(self.samples >= 1, f"samples is {self.samples}; at least 1")
        counted = sorted({"cwe", "fwe"} & set(self.tasks))
        require(
            not counted or "oracle" not in self.strategies,
            f"{', '.join(counted)} are answered by all of their text: no strategy "
            "'oracle' with these tasks",
        )
        check(self.source)
        self.exam()

    @cached_property
    def _source(self) -> Source:
        return Source.of(read(self.source))

    def items(self, tokenizer: Tokenizer, starts: int = 0) -> list[Item]:
        """Every question, length by length, still to be built."""

        def item(task: str, length: int, seed: int) -> Item:
            def build() -> Example:
                sample = Sample(self._source, length, seed)
                return make(tokenizer, task, sample, starts=starts)

            return Item({"example": task, "length": length, "seed": seed}, build)

        return [
            item(task, length, self.seed + number)
            for length in sorted(self.lengths)
            for task in self.tasks
            for number in range(self.samples)
        ]

    def grade(self, query: Query, answer: str) -> float:
        """The share of the wanted strings that occur; for qa, whether any does."""
        score = metrics.contains_all if query.every else metrics.contains_any
        return score(answer, query.answers)

    def summary(self, records: Sequence[Record], *, trained: int) -> Summary:
        """Means and effective length by way of reading, tasks by length, a curve."""
        lengths = sorted({r["length"] for r in records})
        titles = [f"{n:,} tokens" for n in lengths]
        rows, panels, lines, curves = [], [], [], {}
        for way, mine in ways(records):
            tasks = [t for t in TASKS if any(r["ruler"] == t for r in mine)]
            cells = {
                (task, n): [r for r in mine if (r["ruler"], r["length"]) == (task, n)]
                for task in tasks
                for n in lengths
            }
            means = [_mean([mean(cells[t, n]) for t in tasks]) for n in lengths]
            good = [n for n, m in zip(lengths, means, strict=True)
                    if m is not None and 100 * m > self.threshold]  # fmt: skip
            effective = f"{max(good):,}" if good else f"under {lengths[0]:,}"
            shown = [*means, *weighted(means)]
            rows.append((way, *(_percent(m) for m in shown), effective))
            points = zip(lengths, means, strict=True)
            curves[way] = [(n, m) for n, m in points if m is not None]
            by_task = tuple(
                (t, *(_percent(mean(cells[t, n])) for n in lengths)) for t in tasks
            )
            panels.append(Panel(f"RULER, {way}", ("task", *titles), by_task))
            for (task, n), part in cells.items():
                if (score := mean(part)) is not None:
                    lines.append((way, task, n, round(score, 4), len(part)))
            lines += [(way, "mean", n, round(m, 4), len(tasks)) for n, m in curves[way]]
        note = (
            f"Effective length: the longest with a mean above {self.threshold:g} over "
            f"the tasks asked ({len(self.tasks)} of {len(TASKS)}). wAvg weighs lengths "
            "by their rank, the longest (inc) or the shortest (dec) the most. "
            f"{NOTES[self.questions]}"
        )
        columns = ("way", *titles, "wAvg inc", "wAvg dec", "effective")
        first = Panel("RULER", columns, tuple(rows), note)
        header = ("way", "task", "length", "score", "n")
        csv = {"ruler.csv": to_csv(header, lines)}
        passing = {f"passes above {self.threshold:g}": self.threshold / 100}
        curves = {way: points for way, points in curves.items() if points}
        pictures = {}
        if curves:
            drawn = figures.score_lines(curves, across="tokens", bounds=passing)
            pictures["ruler.png"] = drawn
        return Summary((first, *panels), pictures, csv)


def weighted(means: Sequence[float | None]) -> tuple[float | None, float | None]:
    """wAvg (inc) and (dec): weights 1..n that grow, or fall, with the length.

    None where a length has no score.
    """
    if any(m is None for m in means):
        return None, None
    ranks = range(1, len(means) + 1)
    total = sum(ranks)
    rising = sum(w * m for w, m in zip(ranks, means, strict=True)) / total
    falling = sum(w * m for w, m in zip(reversed(ranks), means, strict=True)) / total
    return rising, falling


def _percent(value: float | None) -> str:
    return show(value, ".1f", scale=100.0)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
