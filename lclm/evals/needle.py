"""Needles in a haystack: invented facts inside a real text, a grid of questions.

The grid is that of LLMTest_NeedleInAHaystack; facts nobody can know and exact
matching replace its judge model.
"""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lclm.data.haystack import (
    encode_prefix,
    fit,
    insertion_point,
    repeat_to,
    sentence_enders,
)
from lclm.data.sources import read
from lclm.evals.asking import check_questions
from lclm.evals.base import (
    Example,
    Journal,
    LanguageModel,
    Observe,
    Query,
    Record,
    Summary,
    Tokenizer,
    require,
    silent,
)
from lclm.evals.retrieval import Asker, Cell, check_grid, run_grid, summarise

OPENING = "Read the text below. A question about it follows.\n\n"
ADJECTIVES = (
    "amber", "brisk", "copper", "crimson", "distant", "gentle", "hollow", "ivory",
    "marble", "mellow", "narrow", "nimble", "pale", "quiet", "silver", "velvet",
)  # fmt: skip
NOUNS = (
    "anchor", "badger", "beacon", "candle", "falcon", "garden", "harbour", "kettle",
    "ladder", "lantern", "meadow", "orchard", "pebble", "quarry", "thimble", "willow",
)  # fmt: skip
CITIES = (
    "Accra", "Bergen", "Cusco", "Dublin", "Fez", "Geneva", "Hanoi", "Izmir",
    "Kyoto", "Lisbon", "Lima", "Nairobi", "Oslo", "Quito", "Riga", "Tunis",
)  # fmt: skip
NEW_TOKENS = 32
SPACINGS = ("linear", "sigmoid")
MODES = ("keywords", "strict")


def depths(points: int, *, spacing: str = "linear") -> tuple[float, ...]:
    """`points` depths from 0 to 1; `sigmoid` crowds them towards both ends."""
    require(points >= 1, f"points is {points}; at least 1")
    require(spacing in SPACINGS, f"spacing is {spacing!r}; allowed are {SPACINGS}")
    if points == 1:
        return (0.5,)
    linear = [round(100 * i / (points - 1)) for i in range(points)]
    if spacing == "linear":
        return tuple(d / 100 for d in linear)
    curve = [
        d if d in (0, 100) else round(100 / (1 + math.exp(-0.1 * (d - 50))), 3)
        for d in linear
    ]
    return tuple(round(d / 100, 5) for d in curve)


def facts(count: int, *, seed: int) -> list[tuple[str, str]]:
    """`count` distinct (subject, seven digits), for instance a code for one city."""
    require(
        1 <= count <= len(CITIES),
        f"needles is {count}; allowed is 1 to {len(CITIES)}, one per city",
    )
    rng = random.Random(f"needle:{seed}:{count}")
    cities = rng.sample(CITIES, count)
    return [
        (
            f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} code for {city}",
            str(rng.randint(1_000_000, 9_999_999)),
        )
        for city in cities
    ]


def question(subjects: Sequence[str]) -> str:
    """One question about every subject, ending where the answer starts."""
    if len(subjects) == 1:
        return f"\n\nQuestion: What is the {subjects[0]}?\nAnswer: The {subjects[0]} is"
    listed = ", the ".join(subjects[:-1]) + f" and the {subjects[-1]}"
    return (
        f"\n\nQuestion: What are the {listed}?\n"
        f"Answer: The {len(subjects)} codes, in this order, are"
    )


@dataclass(frozen=True)
class Haystack:
    """Token ids of a text, long enough, with the ids that end a sentence in it."""

    ids: tuple[int, ...]
    enders: frozenset[int]

    @classmethod
    def build(cls, tokenizer: Tokenizer, text: str, *, count: int) -> "Haystack":
        """The first `count` tokens of `text`, said again where it is shorter."""
        ids = encode_prefix(tokenizer.encode, text, count=count)
        ids = repeat_to(ids, count)
        return cls(tuple(ids), sentence_enders(ids, tokenizer.decode))


def insert(
    tokenizer: Tokenizer,
    hay: Sequence[int],
    enders: frozenset[int],
    *,
    needles: Sequence[str],
    at: Sequence[float],
) -> str:
    """`hay` as text with needle i at depth `at[i]`, each at the start of a sentence."""
    points = [insertion_point(hay, d, enders=enders) for d in at]
    order = sorted(range(len(needles)), key=lambda i: points[i])
    text, start = "", 0
    for i in order:
        text = _join(text, tokenizer.decode(list(hay[start : points[i]])))
        text = _join(text, needles[i])
        start = points[i]
    return _join(text, tokenizer.decode(list(hay[start:])))


def _join(left: str, right: str) -> str:
    """Two pieces of prose, exactly as they are, with a space between if none is."""
    if not left or not right or left[-1].isspace() or right[0].isspace():
        return left + right
    return f"{left} {right}"


def make(
    tokenizer: Tokenizer,
    haystack: Haystack,
    *,
    length: int,
    depth: float,
    seed: int,
    needles: int = 1,
    starts: int = 0,
) -> Example:
    """A prompt of at most `length` tokens, as near to it as whole tokens allow.

    `starts` tokens (BOS) that the model adds by itself are counted in. Needle i of n is
    wanted at `depth + i (1 - depth) / n`. `meta` says where the
    needles really are: the share of context tokens before each.
    """
    require(0 <= depth <= 1, f"depth is {depth}; allowed is 0 to 1")
    pairs = facts(needles, seed=seed)
    lines = [f"The {subject} is {value}." for subject, value in pairs]
    wanted = [depth + i * (1 - depth) / needles for i in range(needles)]
    asked = question([subject for subject, _ in pairs])

    @functools.cache
    def build(count: int) -> tuple[str, int]:
        hay = haystack.ids[:count]
        body = insert(tokenizer, hay, haystack.enders, needles=lines, at=wanted)
        return body, starts + len(tokenizer.encode(OPENING + body + asked))

    def size(count: int) -> int:
        # Past the end of the haystack nothing fits, so that `fit` stops there.
        return build(count)[1] if count <= len(haystack.ids) else length + 1

    count = fit(size, length, guess=length - size(0))
    body, total = build(count)
    whole = max(1, len(tokenizer.encode(body)))
    actual = [
        round(len(tokenizer.encode(body[: body.index(line)])) / whole, 4)
        for line in lines
    ]
    meta = {
        "prompt_tokens": total,
        "needles": lines,
        "actual_depth": actual[0],
        "actual_depths": actual,
    }
    values = tuple(value for _, value in pairs)
    new_tokens = NEW_TOKENS + 12 * (needles - 1)
    query = Query(
        asked,
        values,
        new_tokens,
        asked=asked.partition("\nAnswer")[0].strip(),
        gold="\n".join(lines),
        every=True,
    )
    return Example(body, (query,), OPENING, meta)


def score(example: Example | Query, answer: str, *, mode: str = "keywords") -> float:
    """Share of the values found in the answer; `strict`: only in its first line."""
    if mode == "strict":
        answer = (answer.strip().splitlines() or [""])[0]
    found = [value.lower() in answer.lower() for value in example.answers]
    return sum(found) / len(found)


@dataclass(frozen=True)
class Needle:
    """Score by length and depth. `at` gives the depths; else `points` of them are
    spread over [0, 1] by `spacing`. `questions`: "hidden" reads the text, and
    compresses it, before the question is known.
    """

    lengths: tuple[int, ...] = tuple(512 * 2**i for i in range(9))
    at: tuple[float, ...] = ()
    points: int = 11
    spacing: str = "linear"
    needles: int = 1
    trials: int = 1
    source: str = "kjv"
    caches: tuple[str, ...] = ("full",)
    mode: str = "keywords"
    questions: str = "seen"
    seed: int = 0

    SCOPE: ClassVar = ("source", "needles", "mode")

    def __post_init__(self):
        check_grid(self.lengths, self.at, self.caches)
        check_questions(self.questions)
        require(self.trials >= 1, f"trials is {self.trials}; at least 1")
        require(self.mode in MODES, f"mode is {self.mode!r}; allowed are {MODES}")
        depths(self.points, spacing=self.spacing)
        facts(self.needles, seed=self.seed)

    def cells(self) -> list[Cell]:
        """Every question, cache by cache, short lengths first."""
        where = self.at or depths(self.points, spacing=self.spacing)
        return [
            Cell(length, depth, self.seed + trial, cache)
            for cache in self.caches
            for length in sorted(self.lengths)
            for depth in where
            for trial in range(self.trials)
        ]

    def haystack(self, tokenizer: Tokenizer) -> Haystack:
        """The source's first tokens, as many as the longest prompt."""
        return Haystack.build(tokenizer, read(self.source), count=max(self.lengths))

    def examples(self, tokenizer: Tokenizer) -> list[Example]:
        """The distinct questions, in the order of `cells` for one cache."""
        haystack = self.haystack(tokenizer)
        return [
            self._make(tokenizer, haystack, cell)
            for cell in self.cells()
            if cell.cache == self.caches[0]
        ]

    def _make(
        self, tokenizer: Tokenizer, haystack: Haystack, cell: Cell, starts: int = 0
    ) -> Example:
        return make(
            tokenizer,
            haystack,
            length=cell.length,
            depth=cell.depth,
            seed=cell.seed,
            needles=self.needles,
            starts=starts,
        )

    def grade(self, example: Example | Query, answer: str) -> float:
        """Score of an answer in [0, 1]."""
        return score(example, answer, mode=self.mode)

    def run(
        self, lm: LanguageModel, *, journal: Journal, observe: Observe = silent
    ) -> list[Record]:
        """Ask every question not yet in the journal."""
        built: list[Haystack] = []
        starts, asker = len(lm.encode("")), Asker(lm, self.questions)

        def example(cell: Cell) -> Example:
            if not built:
                built.append(self.haystack(lm.tokenizer))
            return self._make(lm.tokenizer, built[0], cell, starts)

        def ask(question: Example, cell: Cell) -> Record:
            said = asker.answer(question, cell)
            return {**said, "score": self.grade(question, said["prediction"])}

        return run_grid(
            self.cells(),
            task="needle",
            questions=self.questions,
            make=example,
            ask=ask,
            journal=journal,
            observe=observe,
        )

    def summary(self, records: Sequence[Record], *, trained: int) -> Summary:
        """Score by cache and length, CSV of every cell, a heatmap per cache."""
        return summarise(
            records,
            title="Needle in a haystack",
            slug="needle",
            caches=self.caches,
            questions=self.questions,
        )
