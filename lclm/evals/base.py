"""What every evaluation shares: the model it needs, its examples, its records."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from lclm.errors import LclmError

KEY = ("task", "length", "depth", "seed", "cache")
KEY += ("example", "query", "strategy", "questions", "mode")

Record = dict[str, Any]
Observe = Callable[[str, int, int], None]
"""Called with (what is running, steps done, steps in all)."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@runtime_checkable
class Answer(Protocol):
    """What `generate` returns."""

    text: str


@runtime_checkable
class Reader(Protocol):
    """What `prefill` returns: a text that has been read and can be asked about."""

    def generate(
        self, question: str, *, max_new_tokens: int, keep: bool = False
    ) -> Answer:
        """Greedy answer; the text read stays as it was.

        With `keep` question and answer are read into it, for what is asked next.
        """
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """The part of `lclm.load`'s object that evaluations use."""

    tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with the start token where the model wants one."""
        ...

    def nll(
        self,
        tokens: np.ndarray,
        *,
        cache: str = "full",
        chunk: int = 512,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """int [B, T] -> float32 [B, T-1], nats; `progress` hears tokens done."""
        ...

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        cache: str = "full",
        room: int = 0,
    ) -> Answer:
        """Greedy continuation of a text or of token ids."""
        ...

    def prefill(
        self, text: str | Sequence[int], *, cache: str = "full", room: int = 0
    ) -> "Reader":
        """A text read before its questions are known, `room` tokens kept for them."""
        ...

    def resumes(self, cache: str) -> bool:
        """Whether what `prefill` returns under a policy has `resume(tokens, at)`.

        It reads tokens behind the first `at`, in place of what stands there.
        """
        ...

    def cache_bytes(self, cache: str, length: int) -> int:
        """Peak bytes that a policy allocates for a text of `length` tokens."""
        ...


@dataclass(frozen=True)
class Query:
    """One question: `text` follows the context and ends where the answer starts.

    asked: the bare question, what a search looks for. gold: the part of the context
    that answers it. start: the end of `text` that already belongs to the answer. every:
    all answers are wanted, else any one of them.
    """

    text: str
    answers: tuple[str, ...]
    max_new_tokens: int = 32
    asked: str = ""
    gold: str = ""
    start: str = ""
    every: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def perfect(self) -> str:
        """An answer that deserves the full score."""
        return ", ".join(self.answers) if self.every else self.answers[0]


@dataclass(frozen=True)
class Example:
    """A text and the questions about it, apart: it can be read before they are known.

    opening: what stands before the context; `meta` holds what the generator knows.
    """

    context: str
    queries: tuple[Query, ...]
    opening: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def query(self) -> Query:
        """The question of an example that has one."""
        (only,) = self.queries
        return only

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers of an example that has one question."""
        return self.query.answers

    @property
    def prompt(self) -> str:
        """All of an example that has one question: the text a model continues."""
        return self.opening + self.context + self.query.text


@dataclass(frozen=True)
class Panel:
    """A table as data: the terminal, the HTML page and a CSV file print the same."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@runtime_checkable
class Figure(Protocol):
    """A picture as data."""

    title: str

    def png(self) -> bytes:
        """The picture."""
        ...

    def csv(self) -> str:
        """The numbers that it shows."""
        ...


@dataclass(frozen=True)
class Summary:
    """What an evaluation shows for its records: tables, figures by file name (.png),
    and CSV files by theirs; a figure without one of its name gets its own numbers."""

    panels: tuple[Panel, ...]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    csv: Mapping[str, str] = field(default_factory=dict)

    def tables(self) -> dict[str, str]:
        """CSV files by name, one beside every figure."""
        own = {csv_name(name): figure.csv() for name, figure in self.figures.items()}
        return {**own, **self.csv}

    def apart(self, taken: Collection[str]) -> "Summary":
        """The same with other file names where some are `taken`."""
        number, end = 1, ""
        while any(_numbered(n, end) in taken for n in (*self.figures, *self.csv)):
            number += 1
            end = f"-{number}"
        figures = {_numbered(n, end): f for n, f in self.figures.items()}
        return Summary(
            self.panels, figures, {_numbered(n, end): t for n, t in self.csv.items()}
        )


@runtime_checkable
class Evaluation(Protocol):
    """A frozen dataclass of settings that runs, and says what its records mean.

    `SCOPE` names the settings that change a measurement and are not in its key.
    Records of several models carry the name of theirs as "model" (`by_model`).
    """

    SCOPE: ClassVar[tuple[str, ...]]

    def run(
        self, lm: LanguageModel, *, journal: "Journal", observe: Observe
    ) -> list[Record]: ...

    def summary(self, records: Sequence[Record], *, trained: int) -> Summary: ...


def silent(label: str, done: int, total: int) -> None:
    """The observer that shows nothing."""


def require(ok: bool, text: str) -> None:
    """Raise `LclmError(text)` unless `ok`."""
    if not ok:
        raise LclmError(text)


def key_of(record: Mapping[str, Any]) -> tuple:
    """What makes a record the same measurement as another."""
    return tuple(record.get(name) for name in KEY)


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by the model that they are of, "" where a run has only one."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.get("model", ""), []).append(record)
    return found


def row_name(model: str, way: str, ways: int) -> str:
    """A row of a table: the way of reading, the model, or both where both vary."""
    if not model:
        return way
    return f"{model}, {way}" if ways > 1 else model


def read_records(path: Path) -> tuple[list[Record], int]:
    """Every record of a journal, and the bytes they take; what an interrupt tore at
    its end is neither.

    Raises:
      LclmError: a line before the last is not a record.
    """
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    lines = whole.splitlines(keepends=True)
    found: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("a record is a JSON object")
        except ValueError as error:
            if number == len(lines) and len(whole) == len(raw):
                return found, len(whole) - len(line)
            raise LclmError(
                f"{path} line {number} is not a record ({error}); delete that line, or "
                "move the file away to start anew"
            ) from error
        found.append(record)
    return found, len(whole)


class Journal:
    """Append-only JSON lines: a record is on disk before `add` returns.

    `scope` separates runs whose other settings differ: records of another scope stay
    in the file and are never taken for this one's. A last line that an interrupt tore
    is dropped when the file is opened; its measurement is simply made again.

    Raises:
      LclmError: a line before the last is not a record.
    """

    def __init__(self, path: str | Path, *, scope: str = ""):
        self.path = Path(path)
        self.scope = scope
        self.records: list[Record] = []
        if self.path.exists():
            self._load()
        self._found = {key_of(r): r for r in self.records}

    def _load(self) -> None:
        found, size = read_records(self.path)
        self.records = [r for r in found if r.get("scope", "") == self.scope]
        if size != self.path.stat().st_size:
            os.truncate(self.path, size)

    def find(self, **key: Any) -> Record | None:
        """The finished record of this key, or None; what `KEY` names and is not
        given counts as None."""
        return self._found.get(key_of(key))

    def add(self, record: Record) -> Record:
        """Write one finished record and wait until it is on the disk."""
        record = _finite({**record, "scope": self.scope})
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        self._found[key_of(record)] = record
        return record


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: both become null."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def csv_name(figure: str) -> str:
    """The CSV file that stands beside a figure."""
    return str(Path(figure).with_suffix(".csv"))


def _numbered(name: str, end: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}{end}{dot}{suffix}"


def show(value: float | int | None, form: str = ".2f", *, scale: float = 1.0) -> str:
    """A number for a table; a missing one is a dash."""
    return "-" if value is None else format(value * scale, form)


def show_bytes(count: float | int | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def to_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Comma-separated lines with a header; text is quoted where it must be."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([columns, *rows])
    return out.getvalue()
