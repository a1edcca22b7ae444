"""The short string form `name:key=value,...` of policies and patterns."""

import inspect
import re
from collections.abc import Callable
from typing import Any, get_origin

from lclm.errors import LclmError, did_you_mean
from lclm.registry import Table

TEXT = str | tuple[int, ...]
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a word",
    TEXT: "text or a list of token ids",
}
OPTION = re.compile(r'(?:[^,"]|"[^"]*")+')  # a comma inside quotes parts nothing


def build(table: Table, value: Any, example: str) -> Any:
    """Call the table's entry that `value` names with its options, types checked.

    `value` is `name:key=value,...`, or a table with a "name" beside its options.
    """
    name, options = split(table.kind, value, example)
    make = table[name]
    return make(**typed(table.kind, make, name, options))


def split(kind: str, value: Any, example: str) -> tuple[Any, dict[str, Any]]:
    """The name in `value` and its options, as they stand."""
    if isinstance(value, str):
        name, _, text = value.partition(":")
        if text.count('"') % 2:
            raise LclmError(f"{kind} {value!r}: a quote is not closed")
        pairs = [_pair(kind, value, p, example) for p in OPTION.findall(text)]
        return name.strip(), dict(pairs)
    if isinstance(value, dict):
        options = dict(value)
        name = options.pop("name", None)
        return name.strip() if isinstance(name, str) else name, options
    raise LclmError(
        f"{kind} {value!r}: give a string such as {example!r} or a table with a 'name'"
    )


def typed(
    kind: str, make: Callable, name: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """The options as the types that `make` declares for them."""
    return {k: _typed(kind, make, name, k, v) for k, v in options.items()}


def _pair(kind: str, whole: str, text: str, example: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise LclmError(
            f"{kind} {whole!r}: {text!r} is not key=value; write {example!r}, say"
        )
    return key.strip(), re.sub(r'^"(.*)"$', r"\1", value.strip(), flags=re.DOTALL)


def _typed(kind: str, make: Callable, name: str, key: str, value: Any) -> Any:
    options = inspect.signature(make).parameters
    if key not in options:
        raise LclmError(
            f"{kind} {name!r} has no option {key!r}: it has "
            f"{', '.join(options) or 'none'}{did_you_mean(key, options)}"
        )
    hint = options[key].annotation
    if isinstance(value, list | tuple) and get_origin(hint) is tuple:
        return _tuples(value)
    if hint == TEXT:
        return _text(kind, name, key, value)
    wanted = float if hint in (float, float | None) else str if hint is str else int
    try:
        typed = wanted(value)
    except (TypeError, ValueError):
        typed = None
    if typed is None or (wanted is int and isinstance(value, float | bool)):
        raise LclmError(f"{kind} {name!r}: {key}={value!r} is not {WORDS[wanted]}")
    return typed


def _tuples(value: Any) -> Any:
    """Nested lists, as a table of JSON has them, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _text(kind: str, name: Any, key: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(type(v) is int for v in value):
        return tuple(value)
    raise LclmError(f"{kind} {name!r}: {key}={value!r} is not {WORDS[TEXT]}")
