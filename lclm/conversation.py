"""A conversation over one cache: every turn reads only what is new."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from lclm import cache as policies
from lclm.cache.base import layers_of, measured_bytes
from lclm.errors import LclmError
from lclm.language_model import LanguageModel, Policy
from lclm.ops.sampling import Sampler
from lclm.serve.generate import Request, generate, results
from lclm.serve.result import Stats, Stream
from lclm.serve.session import Session

BOUNDED = "streaming:sinks=4,window=2044"
ROOM = 2048  # a cache that grows with the text grows by this many tokens


class Conversation:
    """Messages, and the cache of all that has been said.

    A bounded policy keeps the memory of an endless conversation constant, and BOUNDED
    is what is taken for models with attention; "full" grows by ROOM tokens at a time.
    `system` is a message to begin with. Raises LclmError for
    a model without tokenizer or chat template, and for policies that cut a prompt at
    its end: a conversation has none.
    """

    def __init__(
        self,
        lm: LanguageModel,
        cache: Policy | None = None,
        *,
        system: str | None = None,
        chunk: int = 512,
    ):
        if cache is None:
            cache = BOUNDED if layers_of(lm.config) else "full"
        policy = policies.make(cache).encoded(lm.tokenizer)
        if lm.tokenizer is None:
            raise LclmError(
                "this model has no tokenizer to talk with: put a tokenizer.json beside "
                "its weights"
            )
        if policy.recompute or policy.settles:
            raise LclmError(
                f"{cache!r} has no cache that one turn hands to the next; use "
                f"'full', or a bounded policy such as {BOUNDED!r}"
            )
        self.lm, self.policy, self.chunk = lm, policy, chunk
        self.messages: list[dict[str, Any]] = []
        if system:
            self.messages.append({"role": "system", "content": system})
        self._session: Session | None = None
        self._seen: str | None = ""

    def ask(
        self,
        text: str,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Stream:
        """Say `text`; iterate over the answer, then find it whole in `.result`.

        The answer has to be read to its end before the next question.
        """
        if self._seen is None:
            raise LclmError(
                "the last answer was left unread: iterate over it to its end, or begin "
                "another Conversation"
            )
        sampler = Sampler(temperature, top_k, top_p, min_p)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        request = Request(max_new_tokens, sampler, stop, seed)
        messages = [*self.messages, {"role": "user", "content": text}]
        said = self.lm.tokenizer.chat(messages)
        new = said[len(self._seen) :] if said.startswith(self._seen) else said
        again = self._session is None or new is said
        tokens = self.lm.encode(new, first=again)
        self.messages, self._seen = messages, None
        out = Stream(iter(()))
        out.pieces = self._answer(said, tokens, again, request, out)
        return out

    def _answer(
        self, said: str, tokens: list[int], again: bool, request: Request, out: Stream
    ) -> Iterator[str]:
        began = time.perf_counter()
        session = self._open(len(tokens), again, request.max_new_tokens)
        session.read([tokens])
        jax.block_until_ready(session.last)
        stats = Stats(
            bytes=measured_bytes(session.caches),
            kept=session.policy.kept,
            prompt_tokens=len(tokens),
            prefill_seconds=time.perf_counter() - began,
        )
        before = session.mark() if request.stop else None
        rows = []
        for rows in generate(session, request, self.lm.tokenizer, stats, watch=True):
            if piece := rows[0].ready():
                yield piece
        out.result = results(rows, stats)[0]
        if before:  # tokens of a stop string and behind it were read, but not said
            session.rollback(before)
            if said_tokens := self.lm.encode(out.result.text, first=False):
                session.read([said_tokens])
        self._session = session
        self._seen = said + out.result.text
        self.messages.append({"role": "assistant", "content": out.result.text})
        self.lm.last_stats = stats

    def _open(self, new: int, again: bool, answer: int) -> Session:
        """A session with room for what comes; a new one where the text starts anew."""
        start = 0 if again else int(self._session.start[0])
        length = -(-(start + new + answer) // ROOM) * ROOM
        if again:
            return Session(
                self.lm._engine, self.policy, rows=1, length=length, chunk=self.chunk
            )
        self._session.reserve(length)
        return self._session
