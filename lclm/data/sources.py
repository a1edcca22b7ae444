"""Where text comes from: a short string `name:key=value,...` -> one long string."""

import inspect
from pathlib import Path

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
    name, _, rest = source.partition(":")
    load = SOURCES[name]
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
    return load(**options)


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
