"""The one error type that a user can cause."""

import difflib
from collections.abc import Iterable


class LclmError(ValueError):
    """A mistake in the input: the text names the value, what is allowed, the remedy."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known word, else an empty string."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, word: object, known: Iterable[str]) -> LclmError:
    """The error for a name outside a fixed vocabulary."""
    known = sorted(known)
    hint = did_you_mean(str(word), known)
    return LclmError(f"unknown {kind} {word!r}: known are {', '.join(known)}{hint}")
