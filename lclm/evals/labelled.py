"""Short texts with a label each, to learn from: `csv:path=FILE.csv,test=FILE.csv`.

The files that HELMET (arXiv 2410.02694) draws on, as their authors publish them, and
questions of SQuAD by their article from a package.
"""

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclm.data import qa
from lclm.data.sources import bind
from lclm.errors import LclmError, unknown
from lclm.evals.base import require
from lclm.evals.lines import read_lines
from lclm.registry import Entry, Table

LABELLED = Table(
    "source of labelled texts",
    {
        "squad": Entry(
            "lclm.evals.labelled:squad", "SQuAD's questions by article, 35 labels"
        ),
        "csv": Entry(
            "lclm.evals.labelled:table",
            "columns of a table: BANKING77, NLU (path= test= text= label= separator=)",
        ),
        "clinc": Entry(
            "lclm.evals.labelled:clinc", "CLINC150's data_full.json (path=)"
        ),
        "trec": Entry(
            "lclm.evals.labelled:trec", "TREC's .label files (path= test= label=coarse)"
        ),
        "jsonl": Entry(
            "lclm.evals.labelled:jsonl", "lines with text and label (path= test=)"
        ),
    },
)
KINDS = ("fine", "coarse")
TESTS = 10  # without a file of tests, one text in so many is one
Pair = tuple[str, str]
"""A text and its label."""


@dataclass(frozen=True)
class Labelled:
    """Texts to learn from and texts to ask about.

    Raises:
      LclmError: a label that is asked about and has no shot, or only one label.
    """

    shots: tuple[Pair, ...]
    tests: tuple[Pair, ...]

    def __post_init__(self):
        require(len(self.labels) > 1, f"labels are {self.labels}: 2 or more are needed")
        lost = sorted({label for _, label in self.tests} - set(self.labels))
        require(
            not lost, f"label {lost[:1]} is asked about and no shot has it: mend a file"
        )
        require(bool(self.tests), "no text to ask about: give a test file with some")

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label of a shot, sorted."""
        return tuple(sorted({label for _, label in self.shots}))


def check(source: str) -> None:
    """Refuse a source whose name, options or files are not there; reads nothing."""
    _, options = bind(LABELLED, source)
    test = options.get("test")
    require(
        not test or Path(test).expanduser().is_file(), f"{source!r}: no file {test!r}"
    )


def read(source: str) -> Labelled:
    """The texts that `name:key=value,...` names; a fault is named by file and line."""
    load, options = bind(LABELLED, source)
    return load(**options)


def squad() -> Labelled:
    """Which of 35 articles is a question about? CC-BY-SA-4.0, verified by its hash."""
    asked = [(q, article.title) for article in qa.squad() for q in article.questions]
    return _split([_pair(q[1], title, f"SQuAD {q[0]}") for q, title in asked])


def table(
    path: str,
    test: str = "",
    text: str = "text",
    label: str = "category",
    separator: str = ",",
) -> Labelled:
    """A .csv file with a header; `label=scenario+intent` joins columns (NLU)."""

    def pairs(name: str) -> list[Pair]:
        return list(_table(_file(name), text, label.split("+"), separator))

    return _halves(pairs, path, test)


def _table(
    path: Path, text: str, labels: Sequence[str], separator: str
) -> Iterator[Pair]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=separator)
            header = next(rows, [])
            lost = [name for name in (text, *labels) if name not in header]
            require(not lost, f"{path} line 1 has columns {header} and lacks {lost}")
            at, places = header.index(text), [header.index(name) for name in labels]
            for row in filter(None, rows):
                where = f"{path} line {rows.line_num}"
                good = len(row) == len(header)
                require(good, f"{where} has {len(row)} cells; the header {len(header)}")
                yield _pair(row[at], "_".join(row[i] for i in places), where)
    except (csv.Error, UnicodeDecodeError, TypeError) as error:
        raise LclmError(f"{path} is not a table by {separator!r} ({error})") from error


def clinc(path: str) -> Labelled:
    """CLINC150 with what is out of its scope; asked about is `val`, as HELMET does."""
    file = _file(path)
    found = _json(file)

    def pairs(name: str) -> Iterator[Pair]:
        for part in (name, f"oos_{name}"):
            require(isinstance(found.get(part), list), f"{file} has no list {part!r}")
            for i, entry in enumerate(found[part]):
                where = f"{file}: {part}[{i}]"
                good = isinstance(entry, list) and len(entry) == 2
                require(good, f"{where} is {entry!r}; expected a text and its label")
                yield _pair(*entry, where)

    return Labelled(tuple(pairs("train")), tuple(pairs("val")))


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LclmError(f"{file} is not JSON ({error}): fetch it again") from error
    require(isinstance(found, dict), f"{file} is not an object of lists")
    return found


def trec(path: str, test: str = "", label: str = "fine") -> Labelled:
    """TREC's question types, `fine` ("NUM:dist") or `coarse` ("NUM")."""
    if label not in KINDS:
        raise unknown("kind of TREC label", label, KINDS)

    def pairs(name: str) -> list[Pair]:
        file = _file(name)
        lines = file.read_bytes().decode("latin-1").splitlines()
        found = []
        for number, line in enumerate(lines, 1):
            kind, _, text = line.strip().partition(" ")
            coarse, colon, _ = kind.partition(":")
            where = f"{file} line {number}"
            require(bool(colon), f"{where} is {line!r}; expected 'NUM:dist How far ?'")
            found.append(_pair(text, kind if label == "fine" else coarse, where))
        return found

    return _halves(pairs, path, test)


def jsonl(path: str, test: str = "") -> Labelled:
    """A line is an object with a `text` and a `label`."""
    fields = {"text": str, "label": (str, int)}

    def pairs(name: str) -> list[Pair]:
        file = _file(name)
        return [
            _pair(line["text"], str(line["label"]), f"{file} line {number}")
            for number, line in read_lines(file, fields)
        ]

    return _halves(pairs, path, test)


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    require(path.is_file(), f"no file {name!r}: correct the path")
    return path


def _pair(text: Any, label: Any, where: str) -> Pair:
    """Both in one line each, neither empty."""
    for name, value in (("text", text), ("label", label)):
        good = isinstance(value, str) and value.strip()
        require(bool(good), f"{where}: its {name} is {value!r}; expected words")
    return " ".join(text.split()), " ".join(label.split())


def _halves(pairs, path: str, test: str) -> Labelled:
    if not test:
        return _split(pairs(path))
    return Labelled(tuple(pairs(path)), tuple(pairs(test)))


def _split(pairs: Sequence[Pair]) -> Labelled:
    """One text in `TESTS` is asked about, the same ones each time."""
    mixed = random.Random("labelled").sample(list(pairs), len(pairs))
    cut = max(len(mixed) // TESTS, 1)
    return Labelled(tuple(mixed[cut:]), tuple(mixed[:cut]))
