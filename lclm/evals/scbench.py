"""SCBench's own files (arXiv 2412.10319): one context, several questions, by kind.

Prompts are our own; lengths of answers and metrics are the benchmark's. Where turns of
two tasks alternate, each is scored by its own and the tables part them.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
_FENCED = re.compile(r"^```(?:\w+)?\s*\n(.*?)^```", re.DOTALL | re.MULTILINE)
THRESHOLD = 0.8


@dataclass(frozen=True)
class Kind:
    """What stands before a context and in a question, and how an answer is scored.

    parts: the tasks that a file's turns name as theirs, where it mixes several.
    """

    metric: str = ""
    new_tokens: int = 0
    opening: str = ""
    question: str = "{input}"
    parts: Mapping[str, "Kind"] = field(default_factory=dict)


@dataclass(frozen=True)
class FunctionQuery(Query):
    """A question for a function of a repository; `rivals` are its other functions."""

    rivals: tuple[str, ...] = ()


_READ = "Read the book and answer the questions about it"
_CODE = (
    "Functions of the code below will be described. Repeat the one described exactly "
    "as it stands, between lines of ```.\n\n"
)
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
    "summary": Kind("rouge_lsum", 200),
    "summary_with_needles": Kind(
        parts={
            "summary": Kind("rouge_lsum", 800),
            "passkey": Kind("first_digits", 15),
        }
    ),
    "repoqa": Kind("function", 1024, _CODE),
    "repoqa_and_kv": Kind(
        opening=_CODE,
        parts={"repoqa": Kind("function", 1024), "kv": Kind("contains", 80)},
    ),
}
COLUMNS = tuple(
    column
    for name, kind in KINDS.items()
    for column in ([f"{name}: {part}" for part in kind.parts] or [name])
)
"""The kinds as records and tables name them: a file of two tasks is two."""


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
    kind = KINDS[name]
    fields = FIELDS | ({"repo": str} if _asks_functions(kind) else {})
    lines = list(itertools.islice(read_lines(path, fields), limit or None))
    for number, line in lines:
        empty = not line["multi_turns"]
        require(not empty, f"{path} line {number}: multi_turns is empty")
    functions = _functions(kind, path, lines)
    items = []
    for number, line in lines:
        queries = tuple(
            _query(name, turn, where, functions.get(line.get("repo"), {}))
            for turn, where in _turns(
                path, number, line["multi_turns"][: turns or None]
            )
        )
        context = line["context"]
        context = context if isinstance(context, str) else str(context)
        items.append(_item(name, number, context, queries))
    return items


def _turns(path: Path, number: int, asked: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    for i, turn in enumerate(asked):
        yield turn, f"{path} line {number}: multi_turns[{i}]"


def _item(name: str, number: int, context: str, queries: tuple[Query, ...]) -> Item:
    example = Example(context, queries, KINDS[name].opening, {"kind": name})
    key = {"example": f"{name}:{number}:{fingerprint(example)}"}
    return Item(key, lambda: example, len(queries))


def _part(kind: Kind, turn: Any, where: str) -> str:
    """The task that a turn of a mixed file names as its own; "" in other files."""
    if not kind.parts:
        return ""
    task = checked(turn, {"task": str}, where)["task"].removeprefix("scbench_")
    if task not in kind.parts:
        allowed = ", ".join(f"scbench_{part}" for part in kind.parts)
        raise LclmError(f"{where}: task is {turn['task']!r}; expected one of {allowed}")
    return task


def _asks_functions(kind: Kind) -> bool:
    return any(k.metric == "function" for k in (kind, *kind.parts.values()))


def _functions(
    kind: Kind, path: Path, lines: Sequence[tuple[int, Any]]
) -> dict[str, dict[str, list[str]]]:
    """Repository -> name -> the codes asked for by that name, over all turns read."""
    found: dict[str, dict[str, list[str]]] = {}
    if not _asks_functions(kind):
        return found
    for number, line in lines:
        named = found.setdefault(line["repo"], {})
        for turn, where in _turns(path, number, line["multi_turns"]):
            part = _part(kind, turn, where)
            if (kind.parts[part] if part else kind).metric == "function":
                told = checked(turn, {"name": str, "answer": str}, where)
                codes = named.setdefault(told["name"], [])
                codes += [told["answer"]] if told["answer"] not in codes else []
    return found


def _query(
    name: str, turn: Any, where: str, functions: Mapping[str, Sequence[str]]
) -> Query:
    kind = KINDS[name]
    checked(turn, TURN, where)
    part = _part(kind, turn, where)
    kind = kind.parts[part] if part else kind
    answers = turn["answer"] if isinstance(turn["answer"], list) else [turn["answer"]]
    good = answers and all(str(a).strip() for a in answers)
    require(bool(good), f"{where}: answer is {turn['answer']!r}; expected words")
    answers = tuple(map(str, answers))
    text, options = turn["input"], ""
    meta = {"metric": kind.metric} | ({"kind": f"{name}: {part}"} if part else {})
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
    query = Query(
        f"\n\n{filled}",
        answers,
        kind.new_tokens,
        asked=text,
        every=kind.metric == "contains_all",
        meta=meta,
    )
    if kind.metric != "function":
        return query
    own = functions[turn["name"]]
    rivals = [c for other, codes in functions.items() if other != turn["name"]
              for c in codes]  # fmt: skip
    answers += tuple(code for code in own if code not in answers)
    told = vars(query) | {"answers": answers, "rivals": tuple(rivals)}
    return FunctionQuery(**told)


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


def rouge_lsum(prediction: str, wanted: Sequence[str]) -> float:
    """ROUGE-Lsum f, the best over the wanted summaries."""
    return max(metrics.rouge_lsum(prediction, w) for w in wanted)


def first_digits(prediction: str, wanted: Sequence[str]) -> float:
    """1 if the first run of digits is a wanted one, as it is written."""
    found = metrics.NUMBER.search(prediction)
    return float(bool(found) and found[0] in wanted)


def function(
    prediction: str, wanted: Sequence[str], rivals: Sequence[str] = ()
) -> float:
    """RepoQA's retrieval (arXiv 2406.06025): 1 if the code of the first closed block,
    or all that was said, is likest the wanted function and at least 0.8 like it.

    The likeness is `metrics.bleu`. The benchmark's parser takes the first function of
    a block; here it is the whole block.
    """
    block = _FENCED.search(prediction.strip())
    said = block[1] if block else prediction.strip()
    own = max(metrics.bleu(said, code) for code in wanted)
    near = max((metrics.bleu(said, code) for code in rivals), default=0.0)
    return float(own >= THRESHOLD and own >= near)


def grade(query: Query, answer: str) -> float:
    """The score of an answer by its question's metric, in [0, 1]."""
    if isinstance(query, FunctionQuery):
        return function(answer, query.answers, query.rivals)
    return GRADES[query.meta["metric"]](answer, query.answers)


GRADES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "contains": contains,
    "contains_all": metrics.contains_all,
    "contains_any_case": metrics.contains_any,
    "number": number,
    "choice": choice,
    "qa_f1_zh": qa_f1_zh,
    "label": label,
    "rouge_lsum": rouge_lsum,
    "first_digits": first_digits,
    "function": function,
}
