"""Two readings of the same questions, joined by the keys of their records."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lclm.evals.base import KEY, Panel, Record, Summary, show, to_csv
from lclm.evals.sliding import exp

WAY = ("cache", "strategy", "questions")
QUESTION = tuple(name for name in KEY if name not in WAY)
CUTS = ("dataset", "place", "length", "depth")
MOST = 24  # rows of a table; a finer cut is left out
HEADER = ("reading", "base", *QUESTION, "base_value", "value", "unit")


@dataclass(frozen=True)
class Pairs:
    """Records of a reading beside those of the base on the same questions."""

    base_name: str
    name: str
    pairs: tuple[tuple[Record, Record], ...]

    @classmethod
    def join(
        cls, base: tuple[str, Iterable[Record]], other: tuple[str, Iterable[Record]]
    ) -> "Pairs":
        """Both are a name and its records; what only one was asked is left out."""
        known = {_question(r): r for r in base[1] if _value(r) is not None}
        found = [(known[q], r) for r in other[1]
                 if (q := _question(r)) in known and _value(r) is not None]  # fmt: skip
        return cls(base[0], other[0], tuple(found))

    @property
    def losses(self) -> bool:
        """Whether these are losses in nats, not scores."""
        return bool(self.pairs) and "score" not in self.pairs[0][0]

    def panel(self) -> Panel:
        """Means of both and their difference, over all and over the parts of a task."""
        title = f"{self.name} against {self.base_name}"
        if not self.pairs:
            note = "They have no question in common: lengths, depths or seeds differ."
            return Panel(title, ("part", "same questions"), (("all", "0"),), note)
        return self._loss_panel(title) if self.losses else self._score_panel(title)

    def _score_panel(self, title: str) -> Panel:
        cut = next((n for n in CUTS if 1 < len(self._parts(n)) <= MOST), None)
        parts = sorted(self._parts(cut)) if cut else []
        rows = []
        for part in (*parts, None):
            its = [p for p in self.pairs if part is None or p[0].get(cut) == part]
            base, here = ([r["score"] for r in side] for side in zip(*its, strict=True))
            steps = [b - a for a, b in zip(base, here, strict=True)]
            rows.append(
                (
                    "all" if part is None else _part_name(part),
                    f"{len(its):,}",
                    *(show(sum(x) / len(x), ".1f", scale=100.0) for x in (base, here)),
                    show(sum(steps) / len(steps), "+.1f", scale=100.0),
                    f"{sum(s > 0 for s in steps)}",
                    f"{sum(s < 0 for s in steps)}",
                )
            )
        columns = (cut or "part", "same questions", "base", "here")
        columns += ("difference", "better", "worse")
        note = "Mean scores in percent over the questions that both were asked."
        return Panel(title, columns, tuple(rows), note)

    def _loss_panel(self, title: str) -> Panel:
        spans = [tuple(s[:2]) for s in self.pairs[0][0]["segments"]]
        rows = []
        for span in spans:
            both = [
                [s for s in record["segments"] if tuple(s[:2]) == span]
                for pair in self.pairs
                for record in pair
            ]
            if all(both):
                base, here = (_mean_loss([s for (s,) in both[i::2]]) for i in (0, 1))
                rows.append((f"{span[0]:,} to {span[1]:,}", *self._losses(base, here)))
        whole = [
            _mean_loss([(0, 0, r["nll"], r["tokens"]) for r in side])
            for side in zip(*self.pairs, strict=True)
        ]
        rows.append(("all", *self._losses(*whole)))
        columns = ("positions", "same texts", "base", "here")
        columns += ("difference, nats", "ratio")
        note = (
            "Perplexities of the same tokens. The difference is that of the mean "
            "losses: below 0 is better than the base."
        )
        return Panel(title, columns, tuple(rows), note)

    def _losses(self, base: float, here: float) -> tuple[str, ...]:
        step = here - base
        told = (show(exp(base)), show(exp(here)), show(step, "+.3f"))
        return (f"{len(self.pairs):,}", *told, show(math.exp(step), ".3f"))

    def _parts(self, name: str | None) -> set:
        return {a[name] for a, _ in self.pairs if a.get(name) is not None}

    def lines(self) -> list[tuple]:
        """A CSV row for each question: its key, and both values."""
        unit = "nats per token" if self.losses else "score"
        return [
            (self.name, self.base_name, *_question(a), _value(a), _value(b), unit)
            for a, b in self.pairs
        ]


def summary(found: Sequence[Pairs], name: str) -> Summary:
    """Their tables, and one CSV file with every joined question."""
    rows = [line for pairs in found for line in pairs.lines()]
    return Summary(tuple(p.panel() for p in found), {}, {name: to_csv(HEADER, rows)})


def _question(record: Record) -> tuple:
    return tuple(record.get(name) for name in QUESTION)


def _value(record: Record) -> float | None:
    return record["score"] if "score" in record else record.get("nll")


def _part_name(part: Any) -> str:
    return f"{part:,}" if isinstance(part, int) else str(part)


def _mean_loss(parts: Sequence[Sequence[float | int]]) -> float:
    """Mean of (start, end, nll, count, ...) by their counts."""
    return sum(p[2] * p[3] for p in parts) / sum(p[3] for p in parts)
