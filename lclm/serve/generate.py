"""Generation over a session: dispatches, stop strings, text as it comes."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lclm.errors import LclmError
from lclm.ops.sampling import Sampler
from lclm.serve.result import Generation, Stats
from lclm.serve.session import Session

STEPS = 64  # tokens a dispatch
WATCHED_STEPS = 16  # when text is streamed or stop strings are watched for


@dataclass(frozen=True)
class Request:
    """How to continue a prompt."""

    max_new_tokens: int
    sampler: Sampler = field(default_factory=Sampler)
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 0:
            raise LclmError(
                f"max_new_tokens is {self.max_new_tokens}; it must be at least 0"
            )
        if any(not s for s in self.stop):
            raise LclmError("a stop string is empty; remove it or give it characters")


class _Row:
    """One row's output so far."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self.tokens: list[int] = []
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = tokenizer.stream() if tokenizer is not None else None
        self.text = ""
        self.sent = 0
        self.done = False

    def push(self, token: int) -> None:
        """Take a token; notice a stop string."""
        self.tokens.append(token)
        if self.decoder is not None:
            self.text += self.decoder.push(token)
            self._cut()

    def finish(self) -> None:
        """No more tokens will come."""
        if self.decoder is not None and not self.done:
            self.text += self.decoder.flush()
            self._cut()
        self.done = True

    def ready(self) -> str:
        """Text not yet handed out that no stop string can still reach into."""
        hold = 0 if self.done else max((len(s) - 1 for s in self.stop), default=0)
        end = max(self.sent, len(self.text) - hold)
        piece, self.sent = self.text[self.sent : end], end
        return piece

    def _cut(self) -> None:
        found = [i for s in self.stop if (i := self.text.find(s)) >= 0]
        if found:
            self.text, self.done = self.text[: min(found)], True


def generate(
    session: Session, request: Request, tokenizer: Any, stats: Stats, *, watch: bool
) -> Iterator[list[_Row]]:
    """Decode to the end, yielding all rows after each dispatch."""
    if request.stop and tokenizer is None:
        raise LclmError(
            "stop strings need a tokenizer and this model has none; generate without "
            "stop and cut the tokens yourself"
        )
    rows = [_Row(tokenizer, request.stop) for _ in range(session.rows)]
    active = np.ones(session.rows, bool)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(request.seed), np.arange(session.rows)
    )
    left = request.max_new_tokens
    session.reserve(int(session.start.max()) + left)
    began = time.perf_counter()
    while left and active.any():
        steps = WATCHED_STEPS if watch or request.stop else STEPS
        tokens, active = session.decode(
            active,
            keys,
            sampler=request.sampler,
            limit=min(steps, left),
            steps=steps,
            eos=session.engine.config.eos,
        )
        left -= tokens.shape[1]
        for b, row in enumerate(rows):
            for token in tokens[b]:
                if token >= 0 and not row.done:
                    row.push(int(token))
        active = active & np.array([not row.done for row in rows])
        for b, row in enumerate(rows):
            if not active[b] or not left:
                row.finish()
        stats.decode_seconds = time.perf_counter() - began
        stats.new_tokens = sum(len(row.tokens) for row in rows)
        yield rows


def results(rows: list[_Row], stats: Stats) -> list[Generation]:
    """Finished rows as generations that share their statistics."""
    return [
        Generation(row.text if row.tokenizer is not None else None, row.tokens, stats)
        for row in rows
    ]
