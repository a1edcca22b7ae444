"""Lost in the Middle (arXiv 2307.03172): the same answer at every place of a context.

Two kinds: `qa`, documents of which one answers, and `kv`, a JSON object of random keys.
The benchmark's own files or built ones; the place of the answer is ours to choose.
"""

import random
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lclm.errors import unknown
from lclm.evals import figures, metrics, search
from lclm.evals.base import (
    Example,
    Query,
    Record,
    Summary,
    require,
    to_csv,
)
from lclm.evals.exam import Exam, Examination, Item, mean, table, ways
from lclm.evals.lines import checked, read_lines, texts

KINDS = ("qa", "kv")
HARDNESS = ("hard", "easy")
BOUNDS = ("closed_book", "oracle")
NEW_TOKENS = 100
QA_OPENING = (
    "Answer the question from the search results below; some of them may have nothing "
    "to do with it.\n\n"
)
KV_OPENING = "Find the value of a key in the JSON object below.\n\nJSON data:\n"
KV_FIELDS = {"ordered_kv_records": list, "key": str, "value": str}
QA_FIELDS = {"question": str, "answers": list, "ctxs": list}
DOCUMENT = {"title": str, "text": str}
POOL = 1000  # questions whose gold paragraphs distract from each other's
CANDIDATES = 200  # documents among which the nearest are looked for


@dataclass(frozen=True)
class Asked:
    """A question whose gold part can be put anywhere among the others."""

    question: str
    answers: tuple[str, ...]
    gold: str
    others: tuple[str, ...]


def read_kv(path: Path, limit: int) -> list[Asked]:
    """Questions of a kv-retrieval-N_keys.jsonl.gz file."""
    found = []
    for number, line in _limited(read_lines(path, KV_FIELDS), limit):
        where = f"{path} line {number}"
        pairs = line["ordered_kv_records"]
        good = all(isinstance(p, list) and len(p) == 2 for p in pairs)
        require(good, f"{where}: ordered_kv_records is no list of pairs")
        gold = [p for p in pairs if p == [line["key"], line["value"]]]
        require(len(gold) == 1, f"{where}: its key and value are no pair of it")
        others = tuple(_pair(*p) for p in pairs if p[0] != line["key"])
        found.append(Asked(line["key"], (line["value"],), _pair(*gold[0]), others))
    return found


def build_kv(keys: int, count: int, seed: int) -> list[Asked]:
    """Questions about objects of `keys` random pairs."""
    found = []
    for number in range(count):
        rng = random.Random(f"kv:{seed}:{number}:{keys}")
        ids = [str(uuid.UUID(int=rng.getrandbits(128), version=4))
               for _ in range(2 * keys)]  # fmt: skip
        pairs = [_pair(*ids[i : i + 2]) for i in range(0, 2 * keys, 2)]
        found.append(Asked(ids[0], (ids[1],), pairs[0], tuple(pairs[1:])))
    return found


def _pair(key: str, value: str) -> str:
    return f'"{key}": "{value}"'


def read_qa(path: Path, limit: int) -> list[Asked]:
    """Questions of a genuine nq-open file, with the documents it has."""
    found = []
    for number, line in _limited(read_lines(path, QA_FIELDS), limit):
        where = f"{path} line {number}"
        documents = [
            checked(d, DOCUMENT, f"{where}: ctxs[{i}]")
            for i, d in enumerate(line["ctxs"])
        ]
        gold = [d for d in documents if d.get("isgold")]
        require(len(gold) == 1, f"{where} has {len(gold)} documents with isgold")
        others = tuple(_document(d) for d in documents if not d.get("isgold"))
        answers = texts(line["answers"], f"{where}: answers")
        found.append(Asked(line["question"], answers, _document(gold[0]), others))
    return found


def _document(found: dict[str, Any]) -> str:
    return f"(Title: {found['title']}) {found['text']}"


def _limited(lines: Iterator, limit: int) -> Iterator:
    return (pair for i, pair in enumerate(lines) if not limit or i < limit)


def with_distractors(
    asked: Sequence[Asked], *, pool: Sequence[str], total: int, hard: bool, seed: int
) -> list[Asked]:
    """Questions with `total - 1` other documents each, none of which has an answer.

    Those that came with a question are taken first; the rest are documents of `pool`,
    the nearest to it by BM25 (`hard`) of a few hundred, or any.
    """
    return [
        _filled(a, i, pool=pool, total=total, hard=hard, seed=seed)
        for i, a in enumerate(asked)
    ]


def _filled(
    asked: Asked, number: int, *, pool: Sequence[str], total: int, hard: bool, seed: int
) -> Asked:
    rng = random.Random(f"distractors:{seed}:{number}")
    wanted = [metrics.normalize(a) for a in asked.answers]

    def free(text: str) -> bool:
        plain = metrics.normalize(text)
        return text != asked.gold and not any(w in plain for w in wanted)

    others = list(asked.others[: total - 1])
    missing = total - 1 - len(others)
    if missing:
        some = rng.sample(range(len(pool)), min(len(pool), CANDIDATES + 4 * total))
        left = [pool[i] for i in some if free(pool[i]) and pool[i] not in others]
        require(
            len(left) >= missing,
            f"{missing} documents without an answer are wanted beside question "
            f"{asked.question!r} and {len(left)} are there: fewer documents, or more "
            "questions (limit=0)",
        )
        if hard:
            nearest = search.ranked(search.bm25(asked.question, left))
            left = [left[i] for i in nearest]
        others += left[:missing]
    return Asked(asked.question, asked.answers, asked.gold, tuple(others))


def example(kind: str, asked: Asked, *, place: int) -> Example:
    """The gold part at index `place` of the whole."""
    parts = [*asked.others[:place], asked.gold, *asked.others[place:]]
    if kind == "kv":
        context = "{" + ",\n ".join(parts) + "}"
        question = f'\n\nKey: "{asked.question}"\nCorresponding value:'
        gold, opening = "{" + asked.gold + "}", KV_OPENING
    else:
        lines = [f"Document [{i}]{part}" for i, part in enumerate(parts, 1)]
        context, gold = "\n".join(lines), f"Document [1]{asked.gold}"
        question = f"\n\nQuestion: {asked.question}\nAnswer:"
        opening = QA_OPENING
    query = Query(question, asked.answers, NEW_TOKENS, asked.question, gold=gold)
    return Example(context, (query,), opening, {"place": place, "parts": len(parts)})


@dataclass(frozen=True)
class LostInTheMiddle(Examination):
    """Accuracy by the place of the answer.

    file: a genuine .jsonl.gz; "" builds pairs (`kv`) or takes `source` (`qa`: hotpotqa,
    from a package). total: documents or pairs of a context, 0 for as many as the file
    has. places: indices of the answer, () for five over the context. Prompts above
    `budget` are skipped and counted, as the benchmark does.
    """

    kind: str = "qa"
    file: str = ""
    total: int = 0
    places: tuple[int, ...] = ()
    distractors: str = "hard"
    limit: int = 50
    seed: int = 0
    _: KW_ONLY
    budget: int = 7500
    strategies: tuple[str, ...] = ("closed_book", "whole", "oracle")

    SCOPE: ClassVar = ("kind", "file", "distractors", "budget", "chat")

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("kind", self.kind, KINDS)
        if self.distractors not in HARDNESS:
            raise unknown("kind of distractors", self.distractors, HARDNESS)
        file = Path(self.file).expanduser()
        require(not self.file or file.is_file(), f"no file {self.file!r}")
        for name, value in (("limit", self.limit), ("total", self.total)):
            require(value >= 0, f"{name} is {value}; 0 or more")
        require(bool(self.file) or self.limit > 0, "limit is 0: say how many to build")
        bad = [p for p in self.places if p < 0 or (self.total and p >= self.total)]
        require(not bad, f"places {bad} are outside a context of {self.total} parts")
        self.exam()

    def asked(self) -> list[Asked]:
        """The questions with all their parts."""
        path = Path(self.file).expanduser()
        if self.kind == "kv":
            if not self.file:
                return build_kv(self.total or 75, self.limit, self.seed)
            found = read_kv(path, self.limit)
            return [self._cut(a) for a in found] if self.total else found
        # Distractors come from the whole file, also where few questions are asked.
        whole = read_qa(path, 0) if self.file else _hotpot(max(self.limit, POOL))
        chosen = whole[: self.limit or None]
        most = max(len(a.others) for a in chosen)
        total = self.total or (most + 1 if most else 20)
        return with_distractors(
            chosen,
            pool=sorted({a.gold for a in whole}),
            total=total,
            hard=self.distractors == "hard",
            seed=self.seed,
        )

    def _cut(self, asked: Asked) -> Asked:
        there = len(asked.others) + 1
        require(
            there >= self.total,
            f"{self.file} has {there} pairs a line and total is {self.total}",
        )
        others = asked.others[: self.total - 1]
        return Asked(asked.question, asked.answers, asked.gold, others)

    def items(self, tokenizer: object = None, starts: int = 0) -> list[Item]:
        """Every question at every place, place by place."""
        asked = self.asked()
        parts = min(len(a.others) + 1 for a in asked)
        spread = sorted({round(i * (parts - 1) / 4) for i in range(5)})
        places = self.places or tuple(spread)
        require(
            max(places) < parts,
            f"place {max(places)} is outside a context of {parts} parts",
        )

        def item(number: int, a: Asked, place: int) -> Item:
            key = {"example": f"{number}@{place}", "seed": self.seed, "length": parts}
            return Item(key, lambda: example(self.kind, a, place=place))

        return [item(n, a, p) for p in places for n, a in enumerate(asked)]

    def grade(self, query: Query, answer: str) -> float:
        """`kv`: the value occurs; `qa`: an answer is part of the first line."""
        score: Callable = (
            metrics.contains_any if self.kind == "kv" else metrics.subspan_match
        )
        return score(answer, query.answers)

    @property
    def task(self) -> str:
        """The name in records."""
        return f"lost_in_the_middle {self.kind}"

    def sittings(self, items: list[Item]) -> Iterable[tuple[Exam, list[Item]]]:
        """Closed book and oracle read the same whatever the place: once each."""
        first = [i for i in items if i.key["example"].endswith(f"@{_place(items[0])}")]
        for strategy in self.strategies:
            alone = replace(self.exam(), strategies=(strategy,))
            yield alone, first if strategy in BOUNDS else items

    def summary(self, records: Sequence[Record], *, trained: int) -> Summary:
        """Accuracy by place beside its bounds, as a table, a curve and a CSV file."""
        places = sorted({r["place"] for r in records})
        names = {p: f"at {p}" for p in places}
        title = "Lost in the middle: " + (
            "documents" if self.kind == "qa" else "keys and values"
        )
        panel = table(title, records, column=lambda r: r["place"], names=names)
        lines, curves, bounds = [], {}, {}
        for way, mine in ways(records):
            for place in places:
                part = [r for r in mine if r["place"] == place]
                if (score := mean(part)) is not None:
                    lines.append((way, place, round(score, 4), len(part)))
                    if mine[0]["strategy"] in BOUNDS:
                        bounds[way] = score
                    else:
                        curves.setdefault(way, []).append((place, score))
        header = ("way", "place", "accuracy", "n")
        csv, across = to_csv(header, lines), "place of the answer"
        pictures = {}
        if curves:
            drawn = figures.score_lines(curves, across=across, bounds=bounds)
            pictures["lost_in_the_middle.png"] = drawn
        return Summary((panel,), pictures, {"lost_in_the_middle.csv": csv})


def _place(item: Item) -> str:
    return item.key["example"].partition("@")[2]


def _hotpot(most: int) -> list[Asked]:
    """HotpotQA's first questions with one gold paragraph that holds the answer."""
    from lclm.data.qa import hotpotqa

    found = []
    for question in hotpotqa():
        plain = metrics.normalize(question.answer)
        paragraphs = {t: _document({"title": t, "text": x}) for t, x in question.parts}
        gold = [p for t, p in paragraphs.items()
                if t in question.gold and plain in metrics.normalize(p)]  # fmt: skip
        if len(gold) == 1 and not re.fullmatch("yes|no", plain):
            others = tuple(
                p for p in paragraphs.values() if plain not in metrics.normalize(p)
            )
            found.append(Asked(question.question, (question.answer,), gold[0], others))
        if len(found) == most:
            break
    return found
