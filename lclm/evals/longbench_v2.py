"""LongBench v2 (arXiv 2412.15204): four choices about texts of 8k to 2M words."""

import json
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar

from lclm.errors import LclmError
from lclm.evals.base import (
    Example,
    Panel,
    Query,
    Record,
    Summary,
    require,
    show,
    to_csv,
)
from lclm.evals.exam import Examination, Item, fingerprint, table, ways
from lclm.evals.lines import checked, read_lines

CHOICES = "ABCD"
FIELDS = {
    "question": str,
    **{f"choice_{c}": str for c in CHOICES},
    "answer": str,
    "context": str,
    "difficulty": str,
    "length": str,
}
KINDS = ("easy", "hard", "short", "medium", "long")
OPENING = "Read the text below. A question with four choices follows.\n\n"
QUESTION = (
    "\n\nQuestion: {question}\n(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n"
    '(D) {choice_D}\n\nAnswer in this form: "The correct answer is (letter)".\n'
)
NEW_TOKENS = 128
GUESS = 0.25  # what a "compensated" score gives for an answer that names no choice


def choice(answer: str) -> str | None:
    """The letter that an answer declares: in brackets first, else bare; or None."""
    plain = answer.replace("*", "")
    for form in (
        r"The correct answer is \(([A-D])\)",
        r"The correct answer is ([A-D])",
    ):
        if found := re.search(form, plain):
            return found[1]
    return None


@dataclass(frozen=True)
class LongBenchV2(Examination):
    """Accuracy in all, by difficulty and by length.

    file: the benchmark's data.json, or the same as .jsonl. limit: the first so many.
    budget: tokens of a prompt; a longer one is cut in its middle.
    """

    file: str
    limit: int = 0
    _: KW_ONLY
    budget: int = 7500
    strategies: tuple[str, ...] = ("truncate",)

    task: ClassVar = "longbench_v2"
    SCOPE: ClassVar = ("file", "budget", "chat")

    def __post_init__(self):
        require(Path(self.file).expanduser().is_file(), f"no file {self.file!r}")
        require(self.limit >= 0, f"limit is {self.limit}; 0 for all, or more")
        require(
            "oracle" not in self.strategies,
            "LongBench v2 does not say where an answer stands: no strategy 'oracle'",
        )
        self.exam()

    def items(self, tokenizer: object = None, starts: int = 0) -> list[Item]:
        """Every question, checked; questions about one text share its reading."""
        groups: dict[str, list[tuple[str, Query]]] = {}
        rows = _rows(Path(self.file).expanduser())
        for where, row in rows[: self.limit or None]:
            good = row["answer"] in CHOICES and len(row["answer"]) == 1
            require(
                good, f"{where}: answer is {row['answer']!r}; expected A, B, C or D"
            )
            query = Query(
                QUESTION.format(**row),
                (f"The correct answer is ({row['answer']})",),
                NEW_TOKENS,
                asked=row["question"],
                meta={k: row.get(k, "") for k in ("_id", "domain", "difficulty")}
                | {"words": row["length"]},
            )
            groups.setdefault(row["context"], []).append((where, query))
        return [_item(text, found) for text, found in groups.items()]

    def grade(self, query: Query, answer: str) -> float:
        """1 if the declared letter is the right one."""
        return float(choice(answer) == choice(query.answers[0]))

    def summary(self, records: Sequence[Record], *, trained: int) -> Summary:
        """Accuracy by difficulty and length, plain and compensated."""
        rows, lines = [], []
        for way, mine in ways(records):
            cuts = {"all": mine}
            for kind in KINDS:
                cuts[kind] = [r for r in mine if kind in (r["difficulty"], r["words"])]
            asked = {k: [r for r in v if r["score"] is not None]
                     for k, v in cuts.items()}  # fmt: skip
            paid = {k: [_paid(r) for r in v] for k, v in asked.items() if v}
            means = {k: sum(v) / len(v) for k, v in paid.items()}
            rows.append((way, *(show(means.get(k), ".1f", scale=100.0) for k in cuts)))
            for kind, part in asked.items():
                if part:
                    right = sum(r["score"] for r in part) / len(part)
                    told = (round(right, 4), round(means[kind], 4), len(part))
                    lines.append((way, kind, *told))
        plain = table(
            "LongBench v2",
            records,
            column=lambda r: "all",
            names={"all": "accuracy"},
            overall="",
        )
        note = f"An answer that names no choice counts {GUESS}."
        more = Panel("compensated", ("way", "all", *KINDS), tuple(rows), note)
        header = ("way", "kind", "accuracy", "compensated", "n")
        csv = {"longbench_v2.csv": to_csv(header, lines)}
        return Summary((plain, more), {}, csv)


def _paid(record: Record) -> float:
    return GUESS if choice(record["prediction"]) is None else record["score"]


def _item(context: str, found: list[tuple[str, Query]]) -> Item:
    example = Example(context, tuple(q for _, q in found), OPENING)
    number = found[0][0].rpartition(" ")[2]
    told = {"example": f"{number}:{fingerprint(example)}"}
    return Item(told, lambda: example, len(found))


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSON array or of JSON lines."""
    if path.suffix != ".json":
        return [(f"{path} line {n}", row) for n, row in read_lines(path, FIELDS)]
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LclmError(f"{path} is not JSON ({error}): fetch it again") from error
    good = isinstance(rows, list) and bool(rows)
    require(good, f"{path}: expected an array of questions")
    named = ((f"{path} question {i}", row) for i, row in enumerate(rows, 1))
    return [(where, checked(row, FIELDS, where)) for where, row in named]
