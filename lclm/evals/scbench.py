"""SCBench's own files (arXiv 2412.10319): one context, several questions, by kind.

Prompts are our own; lengths of answers and metrics are the benchmark's. Its summaries
and its questions about repositories are not among the kinds: their metrics, ROUGE-Lsum
and a likeness of code, are not here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclm.errors import LclmError
from lclm.evals import many_shot, metrics
from lclm.evals.base import Example, Query, require
from lclm.evals.exam import Item, fingerprint
from lclm.evals.lines import checked, read_lines

FIELDS = {"context": (str, list), "multi_turns": list}
TURN = {"input": str, "answer": (str, int, float, list)}
LETTERS = "ABCD"
_NUMBER = re.compile(r"\d+\.\d+|\d+")
_CHOICE = re.compile(r"\b[A-D]\b")


@dataclass(frozen=True)
class Kind:
    """What stands before a context and in a question, and how an answer is scored."""

    metric: str
    new_tokens: int
    opening: str = ""
    question: str = "{input}"


_READ = "Read the book and answer the questions about it"
KINDS = {
    "kv": Kind("contains", 150, "Find values by their keys in this JSON object.\n\n"),
    "prefix_suffix": Kind("contains", 150),
    "vt": Kind("contains_all", 30),
    "many_shot": Kind("contains_any_case", 10),
    "mf": Kind("number", 5),
    "qa_eng": Kind(
        "contains_any_case",
        40,
        f"{_READ}, as briefly as you can.\n\n",
        "Question: {input}\nAnswer:",
    ),
    "qa_chn": Kind(
        "qa_f1_zh", 40, "请阅读此书并回答问题。\n\n", "问题: {input}\n答案:"
    ),
    "choice_eng": Kind(
        "choice",
        40,
        f"{_READ}.\n\n",
        "Question: {input}\n{options}\n\nThe letter of the right answer is",
    ),
}


def files(folder: Path) -> dict[str, Path]:
    """Kind -> its file in the folder or in `data` in it, in the table's order."""
    found = {}
    for name in KINDS:
        paths = [at / f"scbench_{name}.jsonl" for at in (folder, folder / "data")]
        path = next((p for p in paths if p.is_file()), None)
        if path is not None:
            found[name] = path
    return found


def read_kind(name: str, path: Path, *, turns: int, limit: int) -> list[Item]:
    """The first lines of a file, each with at most so many of its turns."""
    items = []
    for count, (number, line) in enumerate(read_lines(path, FIELDS)):
        if limit and count == limit:
            break
        where = f"{path} line {number}"
        asked = line["multi_turns"][: turns or None]
        require(bool(asked), f"{where}: multi_turns is empty")
        queries = tuple(
            _query(KINDS[name], turn, f"{where}: multi_turns[{i}]")
            for i, turn in enumerate(asked)
        )
        context = line["context"]
        context = context if isinstance(context, str) else str(context)
        items.append(_item(name, number, context, queries))
    return items


def _item(name: str, number: int, context: str, queries: tuple[Query, ...]) -> Item:
    example = Example(context, queries, KINDS[name].opening, {"kind": name})
    key = {"example": f"{name}:{number}:{fingerprint(example)}"}
    return Item(key, lambda: example, len(queries))


def _query(kind: Kind, turn: Any, where: str) -> Query:
    checked(turn, TURN, where)
    answers = turn["answer"] if isinstance(turn["answer"], list) else [turn["answer"]]
    good = answers and all(str(a).strip() for a in answers)
    require(bool(good), f"{where}: answer is {turn['answer']!r}; expected words")
    answers = tuple(map(str, answers))
    text, options = turn["input"], ""
    if kind.metric == "choice":
        given = checked(turn, {"options": list}, where)["options"]
        require(len(given) == 4, f"{where} has {len(given)} options; expected 4")
        answers = (_letter(answers, given, where),)
        lines = (f"{c}. {o}" for c, o in zip(LETTERS, given, strict=True))
        options = "\n".join(lines)
    elif kind.metric == "contains_all" and len(answers) == 1:
        answers = tuple(re.split(r"[\s,]+", answers[0].strip()))
    elif kind.metric == "number":
        good = all(_NUMBER.fullmatch(a) for a in answers)
        require(good, f"{where}: answer is {turn['answer']!r}; expected a number")
    filled = kind.question.replace("{options}", options).replace("{input}", text)
    return Query(
        f"\n\n{filled}",
        answers,
        kind.new_tokens,
        asked=text,
        every=kind.metric == "contains_all",
        meta={"metric": kind.metric},
    )


def _letter(answers: Sequence[str], options: Sequence[Any], where: str) -> str:
    """The letter of an answer that is one, or the text of an option."""
    for answer in answers:
        if answer in LETTERS:
            return answer
        if answer in options:
            return LETTERS[list(options).index(answer)]
    raise LclmError(f"{where}: answer is {list(answers)}; neither A-D nor an option")


def contains(prediction: str, wanted: Sequence[str]) -> float:
    """1 if any wanted string occurs as it stands."""
    return float(any(w in prediction for w in wanted))


def number(prediction: str, wanted: Sequence[str]) -> float:
    """1 if the first number is the wanted one; of a whole one, its whole part."""
    found = _NUMBER.search(prediction)
    if not found:
        return 0.0
    said = float(found[0])
    return float(any((said if "." in w else int(said)) == float(w) for w in wanted))


def choice(prediction: str, wanted: Sequence[str]) -> float:
    """1 if the first letter, or else the first that stands alone, is the right one."""
    text = prediction.strip()
    alone = _CHOICE.search(text)
    said = text[:1] if text[:1] in LETTERS else alone and alone[0]
    return float(bool(said) and said in wanted)


def qa_f1_zh(prediction: str, wanted: Sequence[str]) -> float:
    """Overlap of the bags of characters, the best over the wanted answers."""
    return max(metrics.qa_f1_zh(prediction, w, words=list) for w in wanted)


def label(prediction: str, wanted: Sequence[str]) -> float:
    """`many_shot.score` of built contexts."""
    return many_shot.score(Query("", tuple(wanted)), prediction)


GRADES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "contains": contains,
    "contains_all": metrics.contains_all,
    "contains_any_case": metrics.contains_any,
    "number": number,
    "choice": choice,
    "qa_f1_zh": qa_f1_zh,
    "label": label,
}
