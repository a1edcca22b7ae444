"""Streams of made-up retrieval tasks inside real text, exact in length.

The passkeys of DuoAttention (arXiv 2410.10819, section 2.2): sequences of words hidden
at even depths of a book, all asked for at the end, only the answers predicted. Words,
wording and generator are our own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lclm.data.documents import read_documents
from lclm.data.haystack import insertion_point, sentence_enders
from lclm.data.rows import InMemory, Row
from lclm.data.tokens import encode, text_hash
from lclm.errors import LclmError, unknown

WORDS = (
    "acorn amber anchor apple arrow autumn basket beacon berry birch bridge candle "
    "canyon castle cedar cherry cloud clover copper coral cotton desert eagle ember "
    "falcon feather forest garden ginger glacier granite hammer harbor hazel honey "
    "island ivory jasmine kettle lantern lemon lilac linen maple marble meadow mirror "
    "mountain needle nutmeg ocean olive orchid otter paper pebble pepper pillow plum "
    "pocket prairie puzzle quartz rabbit raven ribbon river saddle saffron sailor "
    "shadow silver sparrow spruce summer thimble thunder tiger timber topaz tulip "
    "valley velvet violet walnut willow window winter"
).split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth"
).split()
OPENING = "Words to be remembered are hidden in this text.\n"
FACT = "\nRemember this: the {which} passkey is{key}.\n"
QUESTION = "\nWhat is the {which} passkey? The {which} passkey is"
ROWS = 1 << 30
KINDS = ("words", "digits")
PREDICT = ("answers", "all")


class Haystack(InMemory):
    """The texts that keys are hidden in, and how."""

    def __init__(self, book: str, tokenizer: Any, **settings: Any):
        found = [d for d in read_documents(book) if d.text is not None]
        ids = [np.asarray(encode(tokenizer, d.text), np.int32) for d in found]
        super().__init__(ids, None, [text_hash(d.text) for d in found])
        self._ids, self._tokenizer, self._settings = ids, tokenizer, settings

    def rows(self, length: int, *, seed: int, docs: np.ndarray) -> "Passkeys":
        """Tasks of exactly `length` inputs inside some of the texts."""
        chosen = [self._ids[int(doc)] for doc in docs]
        text = np.concatenate([*chosen, np.zeros(0, np.int32)])
        return Passkeys(text, self._tokenizer, length, seed, **self._settings)


def passkeys(
    book: str = "kjv",
    keys: str = "10",
    words: str = "32",
    low: str = "0.05",
    high: str = "0.95",
    kind: str = "words",
    predict: str = "answers",
) -> dict[str, Any]:
    """Settings of a stream of passkey tasks, checked.

    keys: hidden at depths `low` to `high` and asked for, fewer where more than half of
    a row would be keys. words: words of a key; kind=digits: that many digits instead.
    predict=all: the book and the keys count too, not only the answers.
    """
    try:
        counts = {"keys": int(keys), "words": int(words)}
        depths = {"low": float(low), "high": float(high)}
    except ValueError as error:
        raise LclmError(f"passkeys: {error}; keys and words are whole numbers") from (
            error
        )
    if not (1 <= counts["keys"] <= len(ORDINALS) and counts["words"] >= 1):
        raise LclmError(
            f"passkeys: {keys} keys of {words} words; allowed are 1 to {len(ORDINALS)} "
            "keys of at least 1"
        )
    if not 0 <= depths["low"] <= depths["high"] <= 1:
        raise LclmError(
            f"passkeys: depths {low} to {high}; allowed is 0 <= low <= high <= 1"
        )
    if kind not in KINDS:
        raise unknown("kind of passkeys", kind, KINDS)
    if predict not in PREDICT:
        raise unknown("choice of what to predict", predict, PREDICT)
    return {"book": book, **counts, **depths, "kind": kind, "predict": predict}


class Passkeys(Sequence):
    """Tasks by number: row i depends on the seed, i and the length only."""

    def __init__(
        self,
        text: np.ndarray,
        tokenizer: Any,
        length: int,
        seed: int,
        *,
        keys: int,
        words: int,
        low: float,
        high: float,
        kind: str,
        predict: str,
    ):
        self._text, self._tokenizer, self._size = text, tokenizer, length + 1
        self._seed, self._words, self._kind = seed, words, kind
        self._low, self._high, self._all = low, high, predict == "all"
        self._enders = sentence_enders(text.tolist(), tokenizer.decode)
        cost = self._cost(keys)
        self._keys = int(min(keys, self._size // 2 // cost))
        if self._keys < 1:
            raise LclmError(
                f"passkeys: a key of {words} {kind} takes {cost} tokens with its "
                f"question, more than half of a row of {length}: use longer rows or "
                "fewer words"
            )
        if len(text) < self._size:
            raise LclmError(
                f"passkeys: the book has {len(text)} tokens, a row {self._size}: give "
                "a longer book"
            )

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> Row:
        rng = np.random.default_rng((self._seed, self._size, row))
        keys = [self._key(rng) for _ in range(self._keys)]
        facts = [
            self._encode(FACT.format(which=ORDINALS[i], key=key))
            for i, key in enumerate(keys)
        ]
        opening = self._encode(OPENING)
        asked: list[int] = []
        answers: list[int] = []
        for i in rng.permutation(self._keys):
            question = self._encode(QUESTION.format(which=ORDINALS[i]))
            answer = self._encode(keys[i])
            asked += question + answer
            answers += [0] * len(question) + [1] * len(answer)
        room = self._size - len(opening) - len(asked) - sum(map(len, facts))
        start = int(rng.integers(len(self._text) - room + 1))
        text = self._text[start : start + room].tolist()
        tokens = [*opening, *self._hidden(text, facts, rng), *asked]
        mask = np.full(self._size, self._all, np.uint8)
        mask[len(tokens) - len(asked) :] |= np.array(answers, np.uint8)
        return {
            "tokens": np.array(tokens, np.int32),
            "segments": np.ones(self._size, np.int32),
            "mask": mask,
        }

    def _hidden(
        self, text: list[int], facts: list[list[int]], rng: np.random.Generator
    ) -> list[int]:
        """`text` with the facts at even depths, each before a sentence."""
        depths = np.linspace(self._low, self._high, len(facts))
        if len(facts) == 1:
            depths = rng.uniform(self._low, self._high, 1)
        places = [insertion_point(text, float(d), enders=self._enders) for d in depths]
        found, at = [], 0
        for place, i in zip(places, rng.permutation(len(facts)), strict=True):
            found += text[at:place] + facts[i]
            at = place
        return found + text[at:]

    def _key(self, rng: np.random.Generator) -> str:
        if self._kind == "digits":
            return " " + "".join(str(d) for d in rng.integers(0, 10, self._words))
        return "".join(" " + WORDS[i] for i in rng.integers(0, len(WORDS), self._words))

    def _cost(self, keys: int) -> int:
        """At most the tokens that one key takes, fact, question and answer."""
        longest = max(WORDS, key=lambda w: len(self._encode(" " + w)))
        digits = self._kind == "digits"
        key = " " + "0" * self._words if digits else f" {longest}" * self._words
        which = max(ORDINALS[:keys], key=lambda o: len(self._encode(o)))
        parts = (FACT.format(which=which, key=key), QUESTION.format(which=which), key)
        return sum(len(self._encode(part)) for part in parts)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))


def haystack(settings: dict[str, Any], tokenizer: Any) -> Haystack:
    """The texts of a checked stream, tokenised."""
    rest = {k: v for k, v in settings.items() if k != "book"}
    return Haystack(settings["book"], tokenizer, **rest)
