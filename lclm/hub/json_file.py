"""JSON objects from files nobody has checked, with types checked on reading."""

import json
from pathlib import Path
from typing import Any

from lclm.errors import LclmError, did_you_mean

LARGEST = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else is an `LclmError` naming the file."""
    try:
        if path.stat().st_size > LARGEST:
            raise LclmError(
                f"{path} is {path.stat().st_size} bytes; at most {LARGEST} are read"
            )
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise LclmError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, LclmError):
            raise
        raise LclmError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise LclmError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


class Keys:
    """Typed reads from one JSON object; afterwards every key must have been used."""

    def __init__(self, table: dict[str, Any], where: str):
        self.table, self.where = table, where
        self.used: set[str] = set()

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """A value of type `kind`, or `default` where the key is absent or null."""
        self.used.add(name)
        value = self.table.get(name)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (
            isinstance(value, bool) and kind is not bool
        ):
            raise LclmError(
                f"{self.where}: {name} is {value!r}; expected {kind.__name__}"
            )
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number >= 1; absent without a default is an error."""
        value = self.get(name, int, default)
        if value is None:
            raise LclmError(f"{self.where}: {name} is missing; the model needs it")
        if value < 1:
            raise LclmError(f"{self.where}: {name} is {value}; it must be at least 1")
        return value

    def finish(self, harmless: frozenset[str], expected: dict[str, Any]) -> None:
        """Refuse keys that would change the model and that nobody read."""
        known = self.used | harmless | set(expected)
        for name, value in self.table.items():
            if name in expected and value not in (None, expected[name]):
                raise LclmError(
                    f"{self.where}: {name} is {value!r}; only {expected[name]!r} is "
                    "implemented"
                )
            if name not in known and value is not None:
                raise LclmError(
                    f"{self.where}: unknown key {name!r} with value {value!r}; it may "
                    "change what the model computes, so it is refused. Remove it if "
                    f"it does not{did_you_mean(name, known)}"
                )
