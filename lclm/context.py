"""Text that has been read once, and what can be asked of it."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from lclm.cache.base import measured_bytes
from lclm.errors import LclmError
from lclm.ops.sampling import Sampler
from lclm.serve import snapshot
from lclm.serve.generate import Request, generate, results
from lclm.serve.marks import Mark
from lclm.serve.result import Generation, Stats, Stream
from lclm.serve.session import Session

if TYPE_CHECKING:
    from lclm.language_model import LanguageModel


class Context:
    """Text that has been read: ask it as often as you like."""

    def __init__(
        self,
        lm: "LanguageModel",
        session: Session,
        stats: Stats,
        *,
        single: bool = True,
    ):
        self.lm, self.session, self.stats, self.single = lm, session, stats, single

    def generate(
        self,
        question: str | Sequence[int],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        stream: bool = False,
        keep: bool = False,
    ) -> Generation | list[Generation] | Stream:
        """Read `question` behind the context and continue; the context is unchanged.

        With `keep` both are read into the context itself, without a copy of its cache;
        `rollback` takes them back. A streamed answer is to be read to its end first.
        """
        sampler = Sampler(temperature, top_k, top_p, min_p)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        request = Request(max_new_tokens, sampler, stop, seed)
        if isinstance(question, str):
            question = self.lm.encode(question, first=False)
        rows = [list(question)] * self.session.rows
        session = self.session if keep else self.session.fork()
        began = time.perf_counter()
        if question:
            session.read(rows)
        jax.block_until_ready(session.last)
        stats = Stats(
            bytes=measured_bytes(session.caches),
            kept=session.policy.kept,
            prompt_tokens=len(question) * session.rows,
            prefill_seconds=time.perf_counter() - began,
        )
        asked = Context(self.lm, session, stats, single=self.single)
        return asked._continue(request, stream=stream, single=self.single)

    def mark(self) -> Mark:
        """This place in the text, to come back to with `rollback`.

        A cache that only grows is not copied for it, nor when it is rolled back: the
        mark holds positions. Caches that evict or wrap around are copied whole, so
        there it takes their bytes once more (`mark.nbytes`).
        """
        return self.session.mark()

    def rollback(self, mark: Mark) -> None:
        """Forget what was read and made since `mark`; marks made since are dropped.

        Raises LclmError for a mark of another context, or one that was dropped.
        """
        self.session.rollback(mark)

    def resume(self, tokens: Sequence[int], at: int) -> None:
        """Read `tokens` behind the first `at`, in place of all that stands there.

        So texts that begin alike are read once as far as they agree. Marks are dropped.
        Raises LclmError where not every layer holds all tokens (`lm.resumes(cache)`).
        """
        began = time.perf_counter()
        self.session.resume([list(tokens)] * self.session.rows, at)
        jax.block_until_ready(self.session.last)
        self.stats = Stats(
            bytes=measured_bytes(self.session.caches),
            kept=self.session.policy.kept,
            prompt_tokens=len(tokens) * self.session.rows,
            prefill_seconds=time.perf_counter() - began,
        )

    def nll(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [B, T-1]: loss of each next token of a text behind the context.

        Every row of the context reads the same tokens [T]; the context is unchanged.
        """
        rows = np.tile(self.lm._tokens(tokens), (self.session.rows, 1))
        if rows.shape[1] < 2:
            raise LclmError("one token leaves nothing to predict: give 2 or more")
        return self.session.fork().nll(rows)

    def score(
        self, texts: Sequence[Sequence[int]], *, keep: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Losses of a text behind each row, and which tokens greedy decoding makes.

        texts: token ids, a text for each row of the context; they may differ in length.
        For each, float32 [T] nats, the first token's given the context alone, and bool
        [T]. With `keep` the texts are read into the context itself, without a copy of
        its cache; `rollback` takes them back.
        """
        if len(texts) != self.session.rows:
            raise LclmError(
                f"{len(texts)} texts for {self.session.rows} rows: give one for each"
            )
        rows = [self.lm._tokens(t)[0].tolist() if len(t) else [] for t in texts]
        if not any(rows):
            raise LclmError("every text is empty: give at least one token")
        session = self.session if keep else self.session.fork()
        nll, greedy = session.score(rows)
        return [(nll[b, : len(r)], greedy[b, : len(r)]) for b, r in enumerate(rows)]

    def save(self, file: str | Path) -> None:
        """Write the compressed cache to one safetensors file."""
        snapshot.save(file, self.session, self.stats, self.single)

    def _continue(
        self, request: Request, *, stream: bool, single: bool
    ) -> Generation | list[Generation] | Stream:
        """Decode in this context's own session."""
        steps = generate(
            self.session, request, self.lm.tokenizer, self.stats, watch=stream
        )
        if stream:
            out = Stream(iter(()))
            out.pieces = self._pieces(steps, out)
            return out
        made = [Generation("", [], self.stats) for _ in range(self.session.rows)]
        for rows in steps:
            made = results(rows, self.stats)
        self.stats.bytes = max(self.stats.bytes, measured_bytes(self.session.caches))
        self.lm.last_stats = self.stats
        return made[0] if single else made

    def _pieces(self, steps: Iterator, out: Stream) -> Iterator:
        sent = 0
        rows = []
        for rows in steps:
            (row,) = rows
            if self.lm.tokenizer is None:
                yield from row.tokens[sent:]
                sent = len(row.tokens)
            elif piece := row.ready():
                yield piece
        made = results(rows, self.stats) if rows else [Generation("", [], self.stats)]
        out.result = made[0]
        self.lm.last_stats = self.stats
