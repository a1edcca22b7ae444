"""RULER's 13 tasks (arXiv 2404.06654), built from a seed to an exact length in tokens.

The texts and generators are our own; counts, depths and frequencies are the paper's.
A builder maps a number of units (words, sentences, documents, ...) to an example.
"""

import functools
import itertools
import math
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lclm.data import qa
from lclm.evals.base import Example, Query, require
from lclm.evals.passkey import FILLER

NOISE = " ".join(FILLER)
DEPTHS = [round(i * 100 / 39) for i in range(40)]
SHORT = 4096  # below this many tokens word counts are the smaller ones
ALPHA = 2.0
_SENTENCE = re.compile(r"[^.!?]+[.!?]*\s*")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

Build = Callable[[int], Example | None]
"""Units -> an example, None where there is no text for so many."""


@dataclass(frozen=True)
class Source:
    """The words of a text: sentences to hide things in, and a vocabulary of it."""

    words: tuple[str, ...]
    vocabulary: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Source":
        """Every word in its order; distinct plain ones of 4 to 10 letters, sorted."""
        plain = {w for w in re.findall(r"\b[a-z]{4,10}\b", text)}
        require(len(plain) >= 100, "the source has fewer than 100 words: give another")
        return cls(tuple(text.split()), tuple(sorted(plain)))

    def prose(self, count: int) -> list[str]:
        """The sentences of the first `count` words, said again where there are less."""
        times = -(-count // len(self.words))
        return _SENTENCE.findall(" ".join((self.words * times)[:count]))


@dataclass(frozen=True)
class Sample:
    """What a task is built from."""

    source: Source
    length: int
    seed: int

    def rng(self, task: str) -> random.Random:
        """The same for the same task, length and seed."""
        return random.Random(f"ruler:{task}:{self.length}:{self.seed}")


@dataclass(frozen=True)
class Niah:
    """Facts about keys in noise, an essay, or other facts of the same form."""

    name: str
    hay: str = "essay"
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    new_tokens: int = 128

    def build(self, sample: Sample) -> Build:
        """Needles of `keys` keys, `queries` of them asked for, `values` each."""
        rng = sample.rng(self.name)
        kind = "number" if self.value == "numbers" else "uuid"

        def fact() -> tuple[str, list[str]]:
            key = random_uuid(rng) if self.key == "uuids" else _pair(rng, sample.source)
            make = random_uuid if self.value == "uuids" else _seven
            return key, [make(rng) for _ in range(self.values)]

        def line(key: str, value: str) -> str:
            return f"One of the special magic {kind}s for {key} is: {value}."

        facts = [fact() for _ in range(max(self.keys, self.queries))]
        asked = facts[: self.queries]
        lines = [line(k, v) for k, values in facts for v in values]
        rng.shuffle(lines)
        answers = tuple(v for _, values in asked for v in values)
        text, start = _niah_question(kind, [k for k, _ in asked], len(answers))
        gold = "\n".join(line(k, v) for k, values in asked for v in values)
        query = _query(text, start, answers, self.new_tokens, gold=gold)
        depths, spread = sorted(rng.sample(DEPTHS, len(lines))), rng.random()
        others = random.Random(rng.random())

        @functools.cache
        def other(_: int) -> str:
            key = (
                random_uuid(others)
                if self.key == "uuids"
                else _pair(others, sample.source)
            )
            make = random_uuid if self.value == "uuids" else _seven
            return line(key, make(others))

        def build(units: int) -> Example:
            if self.hay == "essay":
                parts = sample.source.prose(units)
                at = [int(len(parts) * depth / 100) for depth in depths]
                body = "".join(insert(parts, at, [f"{x} " for x in lines]))
            else:
                noise = self.hay == "noise"
                parts = [NOISE if noise else other(i) for i in range(units)]
                places = random.Random(spread)
                at = sorted(places.randint(0, units) for _ in lines)
                body = "\n".join(insert(parts, at, lines))
            opening = (
                f"Some special magic {kind}s are hidden in the text below. Memorise "
                "them; they will be asked for afterwards.\n"
            )
            return Example(body, (query,), opening)

        return build


def _niah_question(kind: str, keys: Sequence[str], wanted: int) -> tuple[str, str]:
    named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if wanted == 1:
        return (
            f"\nWhat is the special magic {kind} for {named} in the text?",
            f" The special magic {kind} for {named} in the text is",
        )
    return (
        f"\nWhat are all the special magic {kind}s for {named} in the text?",
        f" The special magic {kind}s for {named} in the text are",
    )


def _query(
    text: str, start: str, answers: tuple[str, ...], new: int, *, gold: str = ""
) -> Query:
    return Query(
        text + start,
        answers,
        new,
        asked=text.strip(),
        gold=gold,
        start=start,
        every=True,
    )


def insert(parts: Sequence[str], at: Sequence[int], lines: Sequence[str]) -> list[str]:
    """`parts` with each line before the part at its index, from the right."""
    found = list(parts)
    for place, text in reversed(list(zip(at, lines, strict=True))):
        found.insert(place, text)
    return found


def _seven(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _pair(rng: random.Random, source: Source) -> str:
    return "-".join(rng.sample(source.vocabulary, 2))


def vt(sample: Sample, new_tokens: int = 30) -> Build:
    """A number handed from variable to variable; all five names are asked for."""
    rng = sample.rng("vt")
    shot = "".join(chain_example(rng, letters=3, hops=4, sentences=8))
    lines, value, names = chain_lines(rng, letters=5, hops=4)
    text, start = vt_question(value, len(names))
    query = _query(text, start, tuple(names), new_tokens, gold="\n".join(lines))
    spread = rng.random()

    def build(units: int) -> Example:
        places = random.Random(spread)
        at = sorted(places.randint(0, units) for _ in lines)
        parts = [FILLER[i % len(FILLER)] for i in range(units)]
        opening = (
            "Memorise and follow the chains of variable assignments hidden in the "
            f"following text.\n\n{shot}\n\n"
        )
        return Example("\n".join(insert(parts, at, lines)), (query,), opening)

    return build


def chain_lines(rng: random.Random, *, letters: int, hops: int):
    """(lines, value, names): the first takes a number, each next the one before."""
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(rng.choice(_LETTERS).upper() for _ in range(letters))
        names += [name] if name not in names else []
    value = str(rng.randint(10000, 99999))
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names)]
    return lines, value, names


def chain_example(
    rng: random.Random, *, letters: int, hops: int, sentences: int
) -> list[str]:
    """One worked example."""
    lines, value, names = chain_lines(rng, letters=letters, hops=hops)
    parts = [FILLER[i % len(FILLER)] for i in range(sentences)]
    at = sorted(rng.randint(0, sentences) for _ in lines)
    text, start = vt_question(value, len(names))
    return ["\n".join(insert(parts, at, lines)), text, start, " " + " ".join(names)]


def vt_question(value: str, count: int) -> tuple[str, str]:
    return (
        f"\nQuestion: Which variables are assigned the value {value} in this text?",
        f" Answer: These {count} variables are assigned the value {value}:",
    )


def cwe(sample: Sample, new_tokens: int = 120) -> Build:
    """Ten words that occur more often than all the others of a list."""
    rng = sample.rng("cwe")
    short = sample.length < SHORT
    often, seldom = (6, 1) if short else (30, 3)
    vocabulary = list(sample.source.vocabulary)
    rng.shuffle(vocabulary)
    shots, words = vocabulary[:40], vocabulary[40:]
    told = (20, 3, 1) if short else (40, 10, 3)
    shot = _words(shots, told[0] - 10, often=told[1], seldom=told[2], seed=0.5)
    text, start = (
        "\nQuestion: Which 10 words are the most common in the list above?",
        " Answer: The 10 most common words are:",
    )
    listed = " ".join(f"{i}. {w}" for i, w in enumerate(shots[:10], 1))
    opening = (
        "Below is a numbered list of words. Some are more common than the others. "
        f"Memorise the common ones.\n{shot}{text}{start} {listed}\n\nBelow is a "
        "numbered list of words. Memorise the common ones.\n"
    )
    query = _query(text, start, tuple(words[:10]), new_tokens)
    spread = rng.random()

    def build(units: int) -> Example | None:
        if 10 + units > len(words):
            return None
        body = _words(words, units, often=often, seldom=seldom, seed=spread)
        return Example(body, (query,), opening)

    return build


def _words(
    words: Sequence[str], others: int, *, often: int, seldom: int, seed: float
) -> str:
    """A numbered list: ten words `often` times, `others` more `seldom` times."""
    drawn = list(words[:10]) * often + list(words[10 : 10 + others]) * seldom
    random.Random(seed).shuffle(drawn)
    return " ".join(f"{i}. {w}" for i, w in enumerate(drawn, 1))


def fwe(sample: Sample, new_tokens: int = 50) -> Build:
    """The three most frequent of made-up words whose counts follow a power law."""
    rng = sample.rng("fwe")
    size = max(sample.length // 50, 5)
    coded: list[str] = []
    while len(coded) < size:
        word = "".join(rng.choice(_LETTERS) for _ in range(6))
        coded += [word] if word not in coded else []
    coded[0] = "..."
    text, start = (
        "\nQuestion: Dots apart, which three words occur most often in the coded text?",
        " Answer: The three words that occur most often are:",
    )
    query = _query(text, start, tuple(coded[1:4]), new_tokens)
    opening = "Read the following coded text and count how often each word occurs.\n"
    total, spread = math.pi**2 / 6, rng.random()

    def build(units: int) -> Example:
        drawn: list[str] = []
        for rank, word in enumerate(coded, 1):
            drawn += [word] * int(units * rank**-ALPHA / total)
        random.Random(spread).shuffle(drawn)
        return Example(" ".join(drawn), (query,), opening)

    return build


def qa_1(sample: Sample, new_tokens: int = 32) -> Build:
    """A SQuAD question among paragraphs of its own and of other articles."""
    articles = qa.squad()
    asked = [(a, q) for a in articles for q in a.questions]
    article, (_, question, answers, place) = asked[sample.seed % len(asked)]
    own = [p for i, p in enumerate(article.paragraphs) if i != place]
    rest = [p for a in articles if a is not article for p in a.paragraphs]
    gold = article.paragraphs[place]
    return _documents(
        sample, "qa_1", question, answers, gold=[gold], near=own, far=rest,
        new_tokens=new_tokens,
    )  # fmt: skip


def qa_2(sample: Sample, new_tokens: int = 32) -> Build:
    """A HotpotQA question among its own paragraphs and those of other questions."""
    hops = qa.hotpotqa()
    asked = hops[sample.seed % len(hops)]
    told = {title: f"{title}\n{text}" for title, text in asked.parts}
    gold = [told[t] for t in told if t in asked.gold]
    near = [told[t] for t in told if t not in asked.gold]
    around = range(1, min(len(hops), 1 + sample.length // 100))
    others = (hops[(sample.seed + i) % len(hops)] for i in around)
    rest = [f"{t}\n{x}" for hop in others for t, x in hop.parts if t not in told]
    return _documents(
        sample, "qa_2", asked.question, (asked.answer,), gold=gold, near=near,
        far=list(dict.fromkeys(rest)), new_tokens=new_tokens,
    )  # fmt: skip


def _documents(
    sample: Sample,
    task: str,
    question: str,
    answers: tuple[str, ...],
    *,
    gold: list[str],
    near: list[str],
    far: list[str],
    new_tokens: int,
) -> Build:
    """Gold and `units` other documents, the near ones first, shuffled together."""
    rng = sample.rng(task)
    rng.shuffle(far)
    others, spread = near + far, rng.random()
    rule = (
        "Answer the question from the documents given. Give the answer only, in as few "
        "words as possible."
    )
    query = Query(
        f"\n\n{rule}\n\nQuestion: {question} Answer:",
        answers,
        new_tokens,
        asked=question,
        gold=_numbered(gold),
        start=" Answer:",
    )

    def build(units: int) -> Example | None:
        if units > len(others):
            return None
        shown = gold + others[:units]
        random.Random(spread).shuffle(shown)
        return Example(_numbered(shown), (query,), f"{rule}\n\nDocuments:\n\n")

    return build


def _numbered(documents: Sequence[str]) -> str:
    return "\n\n".join(f"Document {i}:\n{d}" for i, d in enumerate(documents, 1))


_NIAH = (
    Niah("niah_single_1", hay="noise"),
    Niah("niah_single_2"),
    Niah("niah_single_3", value="uuids"),
    Niah("niah_multikey_1", keys=4),
    Niah("niah_multikey_2", hay="needle"),
    Niah("niah_multikey_3", hay="needle", key="uuids", value="uuids"),
    Niah("niah_multivalue", values=4),
    Niah("niah_multiquery", queries=4),
)
TASKS: dict[str, Callable[[Sample], Build]] = {
    **{task.name: task.build for task in _NIAH},
    "vt": vt,
    "cwe": cwe,
    "fwe": fwe,
    "qa_1": qa_1,
    "qa_2": qa_2,
}
