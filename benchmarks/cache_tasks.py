"""Contexts and hidden questions for `benchmarks.caches --tasks`, as token ids."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lclm.data import sources
from lclm.evals import needle, passkey
from lclm.evals.base import Example, Query, Tokenizer

DEPTHS = (0.1, 0.5, 0.9)
FACTS = 5
HAY = "austen:novel=persuasion"


@dataclass(frozen=True)
class Asked:
    """A context, the questions put to it once it is cut, and how answers count."""

    task: str
    example: Example
    grade: Callable[[Query, str], float]

    def request(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What a peer is asked: `tokens` to read, then each question and its answer's
        most tokens."""
        context = tokenizer.encode(self.example.opening + self.example.context)
        asks = [
            [tokenizer.encode(query.text), query.max_new_tokens]
            for query in self.example.queries
        ]
        return {"tokens": context, "asks": asks}

    def points(self, tokenizer: Tokenizer, answers: list[list[int]]) -> list[float]:
        """A score in [0, 1] for each question."""
        pairs = zip(self.example.queries, answers, strict=True)
        return [self.grade(query, tokenizer.decode(said)) for query, said in pairs]


def contexts(tokenizer: Tokenizer, length: int) -> list[Asked]:
    """Passkeys and needles at `DEPTHS`, then five facts in one text, asked one by one.

    length: tokens of a context with its question, at most.
    """
    asked = [
        Asked("passkey", made, passkey.score)
        for made in passkey.Passkey(lengths=(length,), depths=DEPTHS).examples(
            tokenizer
        )
    ]
    single = needle.Needle(lengths=(length,), at=DEPTHS, source=HAY)
    asked += [
        Asked("needle", made, needle.score) for made in single.examples(tokenizer)
    ]
    return [*asked, Asked("recall", recall(tokenizer, length), needle.score)]


def recall(tokenizer: Tokenizer, length: int) -> Example:
    """A text with `FACTS` codes in it and a question for each."""
    hay = needle.Haystack.build(tokenizer, sources.read(HAY), count=length)
    told = {"length": length, "depth": 0.0, "seed": 0, "needles": FACTS}
    made = needle.make(tokenizer, hay, **told)
    queries = tuple(
        Query(needle.question([subject]), (value,), needle.NEW_TOKENS)
        for subject, value in needle.facts(FACTS, seed=0)
    )
    return Example(made.context, queries, made.opening, made.meta)
