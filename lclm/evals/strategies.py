"""What else a user can do with a long text than read it whole: `bm25:words=800`.

A strategy turns an example and one of its questions into what the model reads. Every
evaluation takes a list of them and asks the same questions under each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lclm.data.sources import bind
from lclm.errors import LclmError, unknown
from lclm.evals import search
from lclm.evals.asking import Prompt, roomy
from lclm.evals.base import Example, LanguageModel, Query, require
from lclm.registry import Entry, Table

STRATEGIES = Table(
    "strategy",
    {
        "whole": Entry(
            "lclm.evals.strategies:whole", "all of it; what does not fit is skipped"
        ),
        "truncate": Entry(
            "lclm.evals.strategies:truncate",
            "cut to the budget (side=middle, as LongBench does, left or right)",
        ),
        "bm25": Entry(
            "lclm.evals.strategies:bm25", "the pieces that share the question's words"
        ),
        "dense": Entry(
            "lclm.evals.strategies:dense", "the pieces nearest in meaning (encoder=)"
        ),
        "hybrid": Entry(
            "lclm.evals.strategies:hybrid", "bm25 and dense, by reciprocal rank"
        ),
        "map_reduce": Entry(
            "lclm.evals.strategies:map_reduce", "summaries of every piece, again until"
            " they fit",
        ),
        "refine": Entry(
            "lclm.evals.strategies:refine", "one summary carried through the pieces"
        ),
        "closed_book": Entry("lclm.evals.strategies:closed_book", "no context at all"),
        "oracle": Entry(
            "lclm.evals.strategies:oracle", "only the part that holds the answer"
        ),
    },
)  # fmt: skip
FILLING = ("bm25", "dense", "hybrid", "map_reduce", "refine")
SIDES = ("middle", "left", "right")
SUMMARY_TOKENS = 200
MAP = (
    "Summarise the following part of a longer text in at most 200 words. Keep names, "
    "numbers and dates.\n\n{piece}\n\nSummary:"
)
REFINE = (
    "Summary so far:\n{summary}\n\nNext part of the text:\n{piece}\n\n"
    "Write one summary of both in at most 200 words. Keep names, numbers and dates."
    "\n\nSummary:"
)


@dataclass
class Desk:
    """What strategies work with. `budget`: tokens of a prompt, 0 for no limit.

    `memo` keeps what one context's questions share.
    """

    lm: LanguageModel
    budget: int = 0
    cache: str = "full"
    memo: dict[Any, str] = field(default_factory=dict)

    def size(self, text: str) -> int:
        """Tokens of a first text."""
        return len(self.lm.encode(text))

    def fits(self, text: str) -> bool:
        """Whether a prompt is within the budget."""
        return not self.budget or self.size(text) <= self.budget

    def say(self, prompt: str, new: int) -> str:
        """The model's own words, for strategies that let it read in parts."""
        ids = self.lm.encode(prompt)
        room = roomy(len(ids) + new) - len(ids)
        made = self.lm.generate(ids, max_new_tokens=new, cache=self.cache, room=room)
        return made.text.strip()


Strategy = Callable[[Example, Query, Desk], Prompt | None]
"""What to read for a question; None where it does not fit."""


def make(spec: str) -> Strategy:
    """The strategy that `name:key=value,...` names."""
    build, options = bind(STRATEGIES, spec)
    return build(**options)


def _number(name: str, text: str, *, least: int = 1) -> int:
    if not text.isdigit() or int(text) < least:
        raise LclmError(f"strategy option {name}={text!r}; a whole number >= {least}")
    return int(text)


def _with(example: Example, query: Query, context: str) -> Prompt:
    return Prompt(example.opening + context, query.text, query)


def whole() -> Strategy:
    """The example as it is."""

    def build(example: Example, query: Query, desk: Desk) -> Prompt | None:
        fits = desk.fits(example.opening + example.context + query.text)
        return _with(example, query, example.context) if fits else None

    return build


def truncate(side: str = "middle") -> Strategy:
    """Cut what is over the budget.

    middle: the first and the last half of the budget's tokens of the whole prompt are
    kept, each decoded by itself, which is LongBench's rule. left and right drop tokens
    of the context from its start and from its end.
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)

    def build(example: Example, query: Query, desk: Desk) -> Prompt | None:
        prompt, limit = example.opening + example.context + query.text, desk.budget
        ids = desk.lm.encode(prompt)
        if not limit or len(ids) <= limit:
            return _with(example, query, example.context)
        if side == "middle":
            half, decode = limit // 2, desk.lm.tokenizer.decode
            text = decode(ids[:half]) + decode(ids[-half:])
            if text.endswith(query.text):
                return Prompt(text.removesuffix(query.text), query.text, query)
            return Prompt("", text, query)
        return _shortened(example, query, desk, side)

    return build


def _shortened(example: Example, query: Query, desk: Desk, side: str) -> Prompt | None:
    """The context without as many tokens at one side as bring the prompt to budget."""
    decode, ids = desk.lm.tokenizer.decode, desk.lm.tokenizer.encode(example.context)
    keep = desk.budget - desk.size(example.opening + query.text)
    while keep > 0:
        context = decode(ids[-keep:] if side == "left" else ids[:keep])
        over = desk.size(example.opening + context + query.text) - desk.budget
        if over <= 0:
            return _with(example, query, context)
        keep -= over
    return None


def bm25(size: str = "200", words: str = "1500", order: str = "document") -> Strategy:
    """Pieces of `size` words by BM25 until `words` words or the budget are full."""
    return _searched(_by_words, size, words, order)


def dense(
    encoder: str = "", size: str = "200", words: str = "1500", order: str = "document"
) -> Strategy:
    """Pieces by the cosine of their vectors; `encoder` names a sentence encoder."""
    return _searched(_by_meaning(encoder), size, words, order)


def hybrid(
    encoder: str = "", size: str = "200", words: str = "1500", order: str = "document"
) -> Strategy:
    """Pieces by both rankings, fused by reciprocal rank."""
    near = _by_meaning(encoder)

    def score(query: str, texts: Sequence[str]) -> list[float]:
        ranks = [search.ranked(by(query, texts)) for by in (_by_words, near)]
        return search.fused(*ranks)

    return _searched(score, size, words, order)


def _by_words(query: str, texts: Sequence[str]) -> list[float]:
    return search.bm25(query, texts)


def _by_meaning(encoder: str) -> Callable[[str, Sequence[str]], list[float]]:
    from lclm.evals.encoder import load_encoder

    embed = load_encoder(encoder)
    return lambda query, texts: search.cosine(query, texts, embed)


def _searched(
    score: Callable[[str, Sequence[str]], list[float]],
    size: str,
    words: str,
    order: str,
) -> Strategy:
    """Best pieces first until the words or the budget are full, then put in order."""
    count, most = _number("size", size), _number("words", words)
    if order not in ("document", "score"):
        raise unknown("order", order, ("document", "score"))

    def build(example: Example, query: Query, desk: Desk) -> Prompt | None:
        limit = desk.budget
        frame = desk.size(example.opening + query.text)
        parts = search.pieces(example.context, count)
        chosen: list[int] = []
        used = told = 0
        for index in search.ranked(score(query.asked or query.text, parts)):
            tokens = len(desk.lm.tokenizer.encode(parts[index])) + 1
            if told >= most or frame + used + tokens > limit:
                break
            chosen.append(index)
            used, told = used + tokens, told + len(search.words(parts[index]))
        if order == "document":
            chosen.sort()
        context = "\n".join(parts[i].strip("\n") for i in chosen)
        prompt = example.opening + context + query.text
        return _with(example, query, context) if desk.fits(prompt) else None

    return build


def map_reduce(size: str = "500") -> Strategy:
    """Summaries of pieces of `size` words, summarised again while they do not fit."""
    count = _number("size", size, least=50)

    def summary(text: str, frame: int, desk: Desk) -> str:
        parts = search.pieces(text, count)
        said = [desk.say(MAP.format(piece=p.strip()), SUMMARY_TOKENS) for p in parts]
        joined = "\n\n".join(f"Part {i}: {s}" for i, s in enumerate(said, 1))
        shorter = len(joined) < len(text) and len(parts) > 1
        if frame + desk.size(joined) > desk.budget and shorter:
            return summary(joined, frame, desk)
        return joined

    return _summarised("map_reduce", summary)


def refine(size: str = "500") -> Strategy:
    """A running summary, rewritten with each piece of `size` words."""
    count = _number("size", size, least=50)

    def summary(text: str, frame: int, desk: Desk) -> str:
        first, *rest = search.pieces(text, count)
        held = desk.say(MAP.format(piece=first.strip()), SUMMARY_TOKENS)
        for part in rest:
            prompt = REFINE.format(summary=held, piece=part.strip())
            held = desk.say(prompt, SUMMARY_TOKENS)
        return held

    return _summarised("refine", summary)


def _summarised(name: str, summary: Callable[[str, int, Desk], str]) -> Strategy:
    """A context that fits as it is; of a longer one the summary, made once."""

    def build(example: Example, query: Query, desk: Desk) -> Prompt | None:
        if desk.fits(example.opening + example.context + query.text):
            return _with(example, query, example.context)
        key = (name, example.context)
        if key not in desk.memo:
            frame = desk.size(example.opening + query.text)
            desk.memo.clear()
            desk.memo[key] = summary(example.context, frame, desk)
        prompt = example.opening + desk.memo[key] + query.text
        return _with(example, query, desk.memo[key]) if desk.fits(prompt) else None

    return build


def closed_book() -> Strategy:
    """The question without its context: what the model knew before."""
    return lambda example, query, desk: _with(example, query, "")


def oracle() -> Strategy:
    """Only the part of the context that answers: what a perfect search would give."""

    def build(example: Example, query: Query, desk: Desk) -> Prompt | None:
        require(
            bool(query.gold),
            "strategy 'oracle' needs to know where the answer stands, and these "
            "examples do not say: leave it out here",
        )
        prompt = example.opening + query.gold + query.text
        return _with(example, query, query.gold) if desk.fits(prompt) else None

    return build
