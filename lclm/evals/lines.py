"""JSON lines of other people's files: every fault is named by file and line."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lclm.errors import LclmError

Check = Mapping[str, type | tuple[type, ...]]


def read_lines(path: Path, fields: Check) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a .jsonl or .jsonl.gz file; blank lines are passed over.

    Raises:
      LclmError: no such file, a line that is no JSON object or lacks one of `fields`.
    """
    if not path.is_file():
        raise LclmError(f"no file {str(path)!r}: correct the path")
    opened = gzip.open if path.suffix == ".gz" else open
    count = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    count += 1
                    yield number, _checked(line, fields, f"{path} line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise LclmError(f"{path} cannot be read ({error}): fetch it again") from error
    if not count:
        raise LclmError(f"{path} is empty: it should have one JSON object a line")


def _checked(line: str, fields: Check, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise LclmError(f"{where} is not JSON ({error}): mend or delete it") from error
    return checked(found, fields, where)


def checked(found: Any, fields: Check, where: str) -> dict[str, Any]:
    """`found`, an object that has every one of `fields` with its type."""
    if not isinstance(found, dict):
        raise LclmError(f"{where} is not a JSON object: mend or delete it")
    for name, kind in fields.items():
        if name not in found:
            raise LclmError(
                f"{where} has no field {name!r}; needed are {', '.join(fields)}"
            )
        value = found[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(k.__name__ for k in kinds)
            raise LclmError(f"{where}: {name} is {value!r}; expected {wanted}")
    return found


def texts(value: list, where: str) -> tuple[str, ...]:
    """A list of at least one string, as a tuple."""
    if not value or not all(isinstance(v, str) for v in value):
        raise LclmError(f"{where} is {value!r}; expected a list of strings, not empty")
    return tuple(value)
