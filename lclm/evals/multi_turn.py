"""One context, read and compressed once, and several questions about it.

SCBench's two modes (arXiv 2412.10319): multi-turn, where earlier questions and answers
stay in the session, and multi-request, where each question meets the context as it was
first read. Contexts are built, or come from the benchmark's own files.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from lclm.errors import unknown
from lclm.evals import figures, labelled
from lclm.evals.asking import MODES, TURNS
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
from lclm.evals.exam import Exam, Examination, Item, mean, table, ways
from lclm.evals.labelled import Labelled
from lclm.evals.multi_turn_tasks import TASKS, Sample, make
from lclm.evals.scbench import COLUMNS, KINDS, files, grade, read_kind

TITLE = "Shared context"


@dataclass(frozen=True)
class MultiTurn(Examination):
    """Scores by turn, by kind of task and by length, in each mode.

    folder: SCBench's files, `scbench_kv.jsonl` and so on; "" builds contexts of each of
    `lengths` tokens, all questions and answers included. tasks: kinds, () for all there
    are. turns: questions a context, at most. samples: contexts of a kind. data: texts
    of many_shot.
    """

    folder: str = ""
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (4096,)
    turns: int = 5
    samples: int = 5
    data: str = "squad"
    modes: tuple[str, ...] = ("multi_turn", "multi_request")
    seed: int = 42

    task: ClassVar = "multi_turn"
    SCOPE: ClassVar = ("folder", "turns", "data", "budget", "chat")

    def __post_init__(self):
        known = KINDS if self.folder else TASKS
        for task in self.tasks:
            if task not in known:
                raise unknown("kind of shared context", task, known)
        require(bool(self.lengths), "lengths is empty: give at least one, in tokens")
        require(bool(self.modes), f"modes is empty: give some of {', '.join(MODES)}")
        for name, value in (("turns", self.turns), ("samples", self.samples)):
            require(value >= 1, f"{name} is {value}; at least 1")
        labelled.check(self.data)
        if self.folder:
            folder = Path(self.folder).expanduser()
            require(folder.is_dir(), f"no folder {self.folder!r}: give SCBench's")
            found = files(folder)
            lost = [t for t in self.tasks or ("KIND",) if t not in found]
            require(
                not lost or bool(found and not self.tasks),
                f"{self.folder!r} has no scbench_{''.join(lost[:1])}.jsonl, nor has "
                f"data/ in it; there are {', '.join(found) or 'none'}",
            )
            require(
                "oracle" not in self.strategies,
                "SCBench does not say where an answer stands: no strategy 'oracle'",
            )
        self.exam()

    def exam(self) -> Exam:
        """How the questions are put."""
        return replace(super().exam(), modes=self.modes)

    @cached_property
    def _labelled(self) -> Labelled:
        return labelled.read(self.data)

    def items(self, tokenizer: Tokenizer, starts: int = 0) -> list[Item]:
        """Every context, read and checked, or still to be built."""
        if self.folder:
            found = files(Path(self.folder).expanduser())
            return [
                item
                for name in self.tasks or found
                for item in read_kind(
                    name, found[name], turns=self.turns, limit=self.samples
                )
            ]

        def item(kind: str, length: int, seed: int) -> Item:
            def build() -> Example:
                sample = Sample(length, seed, self.turns, lambda: self._labelled)
                return make(tokenizer, kind, sample, starts=starts)

            key = {"example": kind, "length": length, "seed": seed}
            return Item(key, build, self.turns)

        return [
            item(kind, length, self.seed + number)
            for length in sorted(self.lengths)
            for kind in self.tasks or TASKS
            for number in range(self.samples)
        ]

    def grade(self, query: Query, answer: str) -> float:
        """The kind's metric, in [0, 1]."""
        return grade(query, answer)

    def summary(self, records: Sequence[Record], *, trained: int) -> Summary:
        """Tables by turn, kind and length, modes against each other, a curve."""
        turns = {t: f"turn {t + 1}" for t in sorted({r["query"] for r in records})}
        there = {r["kind"] for r in records}
        kinds = {k: k for k in (*TASKS, *COLUMNS) if k in there}
        lengths = sorted({r["length"] for r in records if r.get("length")})
        by = {"turn": ("query", turns), "task": ("kind", kinds)}
        if len(lengths) > 1:
            by["length"] = ("length", {n: f"{n:,} tokens" for n in lengths})
        panels = [
            table(f"{TITLE}, by {name}", records, column=_field(field), names=names)
            for name, (field, names) in by.items()
        ]
        panels += against(records, kinds)
        lines, curves = [], {}
        for way, mine in ways(records):
            points = [(t + 1, mean(r for r in mine if r["query"] == t)) for t in turns]
            curves[way] = [(t, m) for t, m in points if m is not None]
            cells: dict[tuple, list[Record]] = {}
            for r in mine:
                cells.setdefault((r["kind"], r.get("length"), r["query"]), []).append(r)
            for (kind, length, turn), part in cells.items():
                if (score := mean(part)) is not None:
                    told = (way, kind, length, turn + 1)
                    lines.append((*told, round(score, 4), len(part)))
        curves = {way: points for way, points in curves.items() if points}
        pictures = {}
        if curves:
            pictures["multi_turn.png"] = figures.score_lines(curves, across="turn")
        csv = to_csv(("way", "kind", "length", "turn", "score", "n"), lines)
        return Summary(tuple(panels), pictures, {"multi_turn.csv": csv})


def _field(name: str):
    def column(record: Record) -> Hashable:
        return record[name]

    return column


def against(records: Sequence[Record], kinds: dict[str, str]) -> list[Panel]:
    """What keeping the turns changes, in points: a mode less multi-request."""
    found = []
    apart = dict(ways([r for r in records if r["mode"] == "multi_request"]))
    for mode in TURNS:
        rows = []
        for way, mine in ways([r for r in records if r["mode"] == mode]):
            cells = [
                _difference(mine, apart.get(way, []), kind) for kind in (*kinds, "")
            ]
            rows.append((way, *(show(c, "+.1f", scale=100.0) for c in cells)))
        if rows and apart:
            title = f"{TITLE}, {mode} less multi_request"
            found.append(Panel(title, ("way", *kinds, "all"), tuple(rows)))
    return found


def _difference(
    kept: Sequence[Record], apart: Sequence[Record], kind: str
) -> float | None:
    means = [mean(r for r in part if kind in ("", r["kind"])) for part in (kept, apart)]
    return None if None in means else means[0] - means[1]
