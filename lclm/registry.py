"""Explicit lazy tables: a name, where it lives, one line about it.

A table is a table of contents: nothing is imported until a name is looked up, and
nothing has to be imported for a name to exist.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lclm.errors import unknown


@dataclass(frozen=True)
class Entry:
    """`target` is "module:attribute"; `about` is the line `lclm list` prints."""

    target: str
    about: str


class Table(Mapping[str, Any]):
    """Maps a name to the object it stands for, importing it on first use."""

    def __init__(self, kind: str, entries: dict[str, Entry]):
        self.kind = kind
        self.entries = entries

    def __getitem__(self, name: str) -> Any:
        if name not in self.entries:
            raise unknown(self.kind, name, self.entries)
        module, attribute = self.entries[name].target.split(":")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def about(self) -> dict[str, str]:
        """Name -> one-line description."""
        return {name: entry.about for name, entry in self.entries.items()}
