"""Where text comes from: a short string `name:key=value,...` -> one long string."""

import glob
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lclm.errors import LclmError, did_you_mean
from lclm.registry import Entry, Table

SOURCES = Table(
    "text source",
    {
        "kjv": Entry("lclm.data.books:kjv", "King James Bible, 1.0M tokens, from PyPI"),
        "austen": Entry(
            "lclm.data.books:austen", "a Jane Austen novel (novel=...), from Debian"
        ),
        "local": Entry("lclm.data.sources:local", "a UTF-8 text file (path=...)"),
    },
)


def read(source: str) -> str:
    """The text that `source` names: `kjv`, `austen:novel=emma`, `local:path=FILE`.

    Raises:
      LclmError: unknown source or option, or a text that cannot be had.
    """
    load, options = bind(SOURCES, source)
    return load(**options)


def check(source: str) -> None:
    """Raise what reading `source` would about its name and options; reads nothing."""
    bind(SOURCES, source)


def bind(table: Table, source: str) -> tuple[Callable[..., Any], dict[str, str]]:
    """The function that `name:key=value,...` names in `table`, and its options.

    A comma that no option follows belongs to the value before it.

    Raises:
      LclmError: unknown name or option, an option missing, a path that is not there.
    """
    name, _, rest = source.partition(":")
    load = table[name]
    allowed = list(inspect.signature(load).parameters)
    options: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if options and not (equals and key.isidentifier()):
            options[next(reversed(options))] += "," + part
        elif not equals or key not in allowed:
            raise LclmError(
                f"source {source!r}: {part!r} is not an option of {name!r}; allowed "
                f"are {[f'{a}=...' for a in allowed]}{did_you_mean(key, allowed)}"
            )
        else:
            options[key] = value
    try:
        inspect.signature(load).bind(**options)
    except TypeError as error:
        raise LclmError(f"source {source!r}: {error}; write '{name}:KEY=VALUE'") from (
            error
        )
    path = options.get("path")
    if path and not glob.has_magic(path) and not Path(path).expanduser().exists():
        raise LclmError(f"source {source!r}: there is no {path!r}; correct the path")
    return load, options


def local(path: str) -> str:
    """A UTF-8 text file of the user's.

    Raises:
      LclmError: the file is missing, unreadable, empty, or not UTF-8.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise LclmError(f"no text file at {path!r}: give the path of a UTF-8 file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LclmError(
            f"{path!r} is not UTF-8 text ({error.reason} at byte {error.start}); "
            "convert it, for instance with iconv"
        ) from error
    except OSError as error:
        raise LclmError(f"{path!r} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise LclmError(f"{path!r} is empty: give a file with text in it")
    return text
