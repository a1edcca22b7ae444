"""Many-shot recall as HELMET has it (arXiv 2410.02694): hundreds of labelled texts in
the context, their labels numbers that mean nothing outside of it."""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from lclm.errors import unknown
from lclm.evals import figures, labelled, metrics
from lclm.evals.base import (
    Example,
    Panel,
    Query,
    Record,
    Summary,
    require,
    to_csv,
)
from lclm.evals.exam import Examination, Item, mean, table, ways
from lclm.evals.labelled import Labelled, Pair

LABELS = ("numbers", "words")
NEW_TOKENS = 20
OPENING = (
    "Every text below is followed by its label. Find out what the labels stand for and "
    "give the label of the last text, nothing else.\n\n"
)
_LABEL = re.compile(r"\s*label:\s*", re.IGNORECASE)


def shots(pairs: Sequence[Pair], rng: random.Random) -> Iterator[Pair]:
    """Round after round of one text of every label, each round in an order of its own.

    A label whose texts are used up begins anew; fewer shots are the first of more.
    """
    by_label: dict[str, list[Pair]] = {}
    for pair in rng.sample(list(pairs), len(pairs)):
        by_label.setdefault(pair[1], []).append(pair)
    for turn in itertools.count():
        drawn = [texts[turn % len(texts)] for texts in by_label.values()]
        rng.shuffle(drawn)
        yield from drawn


def learnt(
    data: Labelled, asked: Sequence[Pair], *, count: int, labels: str, seed: int
) -> Example:
    """`count` shots and the texts `asked` about behind them.

    The numbers of the labels are drawn anew for each first text that is asked about;
    the shots are the same for all, as in HELMET.
    """
    drawn = itertools.islice(shots(data.shots, random.Random(f"shots:{seed}")), count)
    numbers = [str(i) for i in range(len(data.labels))]
    random.Random(f"labels:{seed}:{asked[0][0]}").shuffle(numbers)
    told = numbers if labels == "numbers" else data.labels
    label = dict(zip(data.labels, told, strict=True))
    shown = [(kind, f"{text}\nlabel: {label[kind]}") for text, kind in drawn]

    def query(text: str, kind: str) -> Query:
        gold = "\n\n".join(shot for other, shot in shown if other == kind)
        start = "\nlabel:"
        return Query(
            f"\n\n{text}{start}", (label[kind],), NEW_TOKENS, text, gold, start
        )

    context = "\n\n".join(shot for _, shot in shown)
    meta = {"shots": count, "labels": len(data.labels)}
    return Example(context, tuple(query(*pair) for pair in asked), OPENING, meta)


def score(query: Query, answer: str) -> float:
    """1 if the first line, a repeated "label:" apart, is the label."""
    said = metrics.normalize(_LABEL.sub("", metrics.first_line(answer.strip()), 1))
    return float(said == metrics.normalize(query.answers[0]))


@dataclass(frozen=True)
class ManyShot(Examination):
    """Accuracy by the number of shots.

    data: a source of labelled texts. limit: texts asked about; `asked` of them share a
    context and its numbers (HELMET: 1). labels: "words" keeps them, so that what
    a model knew before helps it.
    """

    data: str = "squad"
    shots: tuple[int, ...] = (70, 140, 280)
    limit: int = 50
    asked: int = 5
    labels: str = "numbers"
    seed: int = 42

    task: ClassVar = "many_shot"
    SCOPE: ClassVar = ("data", "asked", "labels", "budget", "chat")

    def __post_init__(self):
        labelled.check(self.data)
        if self.labels not in LABELS:
            raise unknown("kind of labels", self.labels, LABELS)
        require(bool(self.shots), "shots is empty: give at least one number")
        for name, value in (("limit", self.limit), ("asked", self.asked)):
            require(value >= 1, f"{name} is {value}; at least 1")
        self.exam()

    @cached_property
    def _data(self) -> Labelled:
        found = labelled.read(self.data)
        require(
            min(self.shots) >= len(found.labels),
            f"shots are {self.shots} and {self.data!r} has {len(found.labels)} labels: "
            "give at least one shot of each",
        )
        return found

    def items(self, tokenizer: object = None, starts: int = 0) -> list[Item]:
        """Every context, few shots first; which texts are asked depends on the seed."""
        data = self._data
        tests = list(data.tests)
        random.Random(f"tests:{self.seed}").shuffle(tests)
        groups = list(itertools.batched(tests[: self.limit], self.asked))

        def item(number: int, asked: Sequence[Pair], count: int) -> Item:
            told = "\0".join(text for pair in asked for text in pair)
            mark = hashlib.sha256(told.encode()).hexdigest()[:8]
            key = {"example": f"{number}:{mark}", "seed": self.seed, "length": count}
            how = dict(count=count, labels=self.labels, seed=self.seed)
            return Item(key, lambda: learnt(data, asked, **how), len(asked))

        return [
            item(number, asked, count)
            for count in sorted(self.shots)
            for number, asked in enumerate(groups)
        ]

    def grade(self, query: Query, answer: str) -> float:
        """Exact match of the first line."""
        return score(query, answer)

    def summary(self, records: Sequence[Record], *, trained: int) -> Summary:
        """Accuracy by shots beside chance, as a table, a curve and a CSV file."""
        labels = records[0]["labels"]
        counts = sorted({r["shots"] for r in records})
        names = {n: f"{n:,} shots" for n in counts}
        panel = table(
            "Many-shot recall",
            records,
            column=lambda r: r["shots"],
            names=names,
            note=f"{labels} labels, as {self.labels}; chance is {100 / labels:.1f}.",
        )
        lines, curves, sizes = [], {}, []
        for way, mine in ways(records):
            tokens = {n: _tokens(mine, n) for n in counts}
            sizes.append((way, *(f"{t:,.0f}" if t else "-" for t in tokens.values())))
            for n in counts:
                part = [r for r in mine if r["shots"] == n and r["score"] is not None]
                if part:
                    lines.append((way, n, round(mean(part), 4), len(part)))
                    curves.setdefault(way, []).append((n, mean(part)))
        columns = ("way", *names.values())
        second = Panel("Many-shot recall: tokens of a prompt", columns, tuple(sizes))
        csv = to_csv(("way", "shots", "accuracy", "n"), lines)
        pictures = {}
        if curves:
            bounds = {"chance": 1 / labels}
            drawn = figures.score_lines(curves, across="shots", bounds=bounds)
            pictures["many_shot.png"] = drawn
        return Summary((panel, second), pictures, {"many_shot.csv": csv})


def _tokens(records: Sequence[Record], count: int) -> float | None:
    """Mean tokens of the prompts with so many shots."""
    sizes = [r["prompt_tokens"] for r in records
             if r["shots"] == count and "skipped" not in r]  # fmt: skip
    return sum(sizes) / len(sizes) if sizes else None
