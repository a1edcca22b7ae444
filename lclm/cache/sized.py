"""Budgets in bytes: the most tokens whose caches, as they are allocated, fit."""

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from lclm.cache.base import CachePolicy, layers_of
from lclm.config import ModelConfig
from lclm.errors import LclmError
from lclm.learned import Model
from lclm.registry import Table
from lclm.shorthand import typed

OPTIONS = ("budget", "window")
AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B\s*")
MOST = 1 << 30  # tokens of a budget that nothing limits
FAR = 1 << 40  # tokens of a row behind which no bounded cache grows


def amount(value: Any) -> int | None:
    """Bytes of a text such as "64MiB" or "1.5 GB"; None for anything else."""
    found = AMOUNT.fullmatch(value) if isinstance(value, str) else None
    if found is None or (found[3] and not found[2]):
        return None
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " kmgt".index(found[2].lower() or " "))


def in_bytes(options: dict[str, Any]) -> str | None:
    """The option of a policy that is an amount of bytes, if one is."""
    return next((k for k in OPTIONS if amount(options.get(k)) is not None), None)


def from_bytes(
    table: Table, name: Any, options: dict[str, Any], key: str
) -> CachePolicy:
    """The policy `name` of a table with its option `key` in bytes."""
    make, value = table[name], options[key]
    if key != make.sizing:
        raise LclmError(
            f"{table.kind} {name!r}: {key}={value} is an amount of bytes, but {key} "
            "does not set the bytes of its cache; give tokens"
        )
    policy = make(**typed(table.kind, make, name, options | {key: MOST}))
    return Sized(policy, amount(value), f"{name}: {key}={value}")


@dataclass(frozen=True)
class Sized(CachePolicy):
    """A policy that may take `limit` bytes a row; `fitted` makes tokens of them.

    Counted is everything its caches allocate over all attention layers of one row: of a
    text of any length where the caches are bounded, and of the length that a session
    is opened for where some heads or layers keep every token. at="end" counts what
    stays behind the cut. `asked` is how it was spelled.
    """

    policy: CachePolicy
    limit: int
    asked: str

    @property
    def settles(self) -> bool:
        return self.policy.settles

    def encoded(self, tokenizer: Any) -> "Sized":
        return dataclasses.replace(self, policy=self.policy.encoded(tokenizer))

    def verify(self, config: ModelConfig, model: Model) -> None:
        self.policy.verify(config, model)

    def fitted(self, config: ModelConfig, dtype: Any, length: int) -> CachePolicy:
        """The policy with the largest size in tokens that fits, at least the smallest.

        Raises LclmError where what the policy protects takes more.
        """
        layers = layers_of(config)
        if not layers:
            raise LclmError(f"{self.asked} over a model without attention: use 'full'")
        policy, _ = self.policy.resolve(config)

        @functools.cache
        def measure(tokens: int, length: int) -> int:
            made = _of(policy, tokens)
            if made is None:
                return 0  # a little below sizes that a rounding allows
            if made.settles:
                made = made.settled(length)
            caches = jax.eval_shape(
                lambda: [made.over(x).init(x, 1, length, dtype) for x in layers]
            )
            return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))

        least = _largest(lambda n: _of(policy, n) is None, 0, MOST) + 1
        bounded = measure(least, FAR) == measure(least, 2 * FAR)
        length, most = (FAR, MOST) if bounded else (length, max(length, least))
        # A layer whose own window fits keeps no scores: bytes fall at each window.
        windows = {layer.spec.window for layer in layers} - {None}
        starts = [least, *sorted(w for w in windows if least < w <= most)]
        for first, behind in zip(starts[::-1], [most + 1, *starts[:0:-1]], strict=True):
            if measure(first, length) <= self.limit:
                fits = _most(
                    lambda n: measure(n, length), self.limit, first, behind - 1
                )
                return _of(policy, _constructible(policy, fits))
        need = min(measure(first, length) for first in starts)
        of = "" if bounded else f" of {length:,} tokens"
        raise LclmError(
            f"{self.asked}: its smallest cache, {policy.sizing}={least}, takes "
            f"{need:,} bytes a row{of}; give at least that, or let it protect less"
        )


def _of(policy: CachePolicy, tokens: int) -> CachePolicy | None:
    """The policy of another size; None where it refuses that."""
    try:
        return dataclasses.replace(policy, **{policy.sizing: tokens})
    except LclmError:
        return None


def _constructible(policy: CachePolicy, tokens: int) -> int:
    """The next size from `tokens` down that the policy allows."""
    while _of(policy, tokens) is None:
        tokens -= 1
    return tokens


def _largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number up to `high` that `holds`, which it does up to there."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _most(measure: Callable[[int], int], limit: int, low: int, high: int) -> int:
    """The largest size up to `high` that measures at most `limit`, as `low` does.

    Bytes are nearly a straight line in tokens, so few guesses along it find the place.
    """
    below, guess, turn = measure(low), min(low + 64, high), 0
    while low < high:
        found = measure(guess)
        slope = max(1, (found - below) / (guess - low))
        if found <= limit:
            low, below = guess, found
        else:
            high = guess - 1
        turn += 1
        ahead = int((limit - below) / slope) if turn % 4 else (high - low + 1) // 2
        guess = min(low + max(1, ahead), high)
    return low
