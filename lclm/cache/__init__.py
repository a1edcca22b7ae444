"""Cache policies by name, and the short string form `name:key=value,...`."""

import dataclasses
from typing import Any

from lclm.cache.base import CachePolicy
from lclm.errors import LclmError, did_you_mean
from lclm.registry import Entry, Table

POLICIES = Table(
    "cache policy",
    {
        "full": Entry("lclm.cache.policies:Full", "keep every token"),
        "window": Entry("lclm.cache.policies:Window", "the last `window` tokens"),
        "streaming": Entry(
            "lclm.cache.policies:Streaming",
            "StreamingLLM: `sinks` first tokens and the last `window` (2309.17453)",
        ),
        "recompute": Entry(
            "lclm.cache.policies:Recompute",
            "no cache: re-read the last `window` tokens for every token",
        ),
    },
)


def make(policy: Any) -> CachePolicy:
    """A policy from itself, a table with a "name", or a `name:key=value,...` string."""
    if isinstance(policy, CachePolicy):
        return policy
    if isinstance(policy, str):
        name, _, text = policy.partition(":")
        options: dict[str, Any] = dict(_pair(policy, p) for p in text.split(",") if p)
    elif isinstance(policy, dict):
        options = dict(policy)
        name = options.pop("name", None)
    else:
        raise LclmError(
            f"cache policy {policy!r}: give a name such as 'full', a string "
            "'name:key=value,...' or a table with a 'name'"
        )
    cls = POLICIES[name.strip() if isinstance(name, str) else name]
    return cls(**{k: _typed(cls, name, k, v) for k, v in options.items()})


def _pair(policy: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise LclmError(
            f"cache policy {policy!r}: {text!r} is not key=value; write for example "
            "'streaming:sinks=4,window=1020'"
        )
    return key.strip(), value.strip()


def _typed(cls: type, name: str, key: str, value: Any) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if key not in fields:
        raise LclmError(
            f"cache policy {name!r} has no option {key!r}: it has "
            f"{', '.join(fields) or 'none'}{did_you_mean(key, fields)}"
        )
    kind = str if fields[key].type is str else int
    if fields[key].type in (float, float | None):
        kind = float
    try:
        typed = kind(value)
    except (TypeError, ValueError):
        typed = None
    if typed is None or (kind is int and isinstance(value, float | bool)):
        what = {int: "a whole number", float: "a number", str: "a word"}[kind]
        raise LclmError(f"cache policy {name!r}: {key}={value!r} is not {what}")
    return typed
