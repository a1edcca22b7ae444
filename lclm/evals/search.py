"""Finding the parts of a text that a question is about: pieces, BM25, vectors."""

# ruff: noqa: RUF001 - full-width marks end sentences too.
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

WORD = re.compile(r"[\u4e00-\u9fff]|\w+")
_SENTENCE = re.compile(r"[^.?!;。？！；\n]*(?:[.?!;。？！；\n]+\s*|$)")
K1, B = 1.5, 0.75
FLOOR = 0.25  # of the mean weight, for words in more than half of the pieces
FUSION = 60

Embed = Callable[[Sequence[str]], Float[np.ndarray, "pieces width"]]


def words(text: str) -> list[str]:
    """Lowercase words; a Chinese character is one."""
    return WORD.findall(text.lower())


def pieces(text: str, size: int) -> list[str]:
    """`text` cut at sentence ends into pieces of at most `size` words.

    A sentence longer than that is a piece of its own; joined, the pieces are the text.
    """
    found, held, count = [], "", 0
    for sentence in _SENTENCE.findall(text):
        more = len(words(sentence))
        if held and count + more > size:
            found.append(held)
            held, count = "", 0
        held, count = held + sentence, count + more
    return [*found, held] if held else found


def bm25(query: str, texts: Sequence[str]) -> list[float]:
    """Okapi BM25 of each text, k1 1.5 and b 0.75, over words.

    Weights are ln(N - n + 0.5) - ln(n + 0.5); a negative one is replaced by a quarter
    of the mean weight, as the package rank-bm25 does.
    """
    bags = [Counter(words(text)) for text in texts]
    sizes = [sum(bag.values()) for bag in bags]
    mean = sum(sizes) / max(len(sizes), 1) or 1.0
    spread = Counter(word for bag in bags for word in bag)
    total = len(texts)
    weights = {w: math.log(total - n + 0.5) - math.log(n + 0.5) for w, n in
               spread.items()}  # fmt: skip
    least = FLOOR * sum(weights.values()) / max(len(weights), 1)
    weights = {w: least if value < 0 else value for w, value in weights.items()}
    asked = [w for w in words(query) if w in weights]
    return [
        sum(
            weights[w] * bag[w] * (K1 + 1) / (bag[w] + K1 * (1 - B + B * size / mean))
            for w in asked
        )
        for bag, size in zip(bags, sizes, strict=True)
    ]


def cosine(query: str, texts: Sequence[str], embed: Embed) -> list[float]:
    """Cosine of the question's vector and each text's."""
    vectors = embed([query, *texts])
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return (unit[1:] @ unit[0]).tolist()


def ranked(scores: Sequence[float]) -> list[int]:
    """Indices, best first; of equals the earlier one."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def fused(*rankings: Sequence[int]) -> list[float]:
    """Reciprocal rank fusion: the sum of 1 / (60 + rank) over the rankings."""
    scores = [0.0] * len(rankings[0])
    for ranking in rankings:
        for rank, index in enumerate(ranking, 1):
            scores[index] += 1 / (FUSION + rank)
    return scores
