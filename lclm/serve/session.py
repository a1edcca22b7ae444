"""Driving a model through a cache: chunked reading, overflow steps, decoding."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lclm.blocks.layer import init_states, state_bytes
from lclm.cache.base import CachePolicy, fit
from lclm.errors import LclmError
from lclm.learned import Model
from lclm.ops.sampling import Sampler
from lclm.serve import calls, memory
from lclm.serve.calls import Chunk, Engine, How, Rows
from lclm.serve.marks import Mark, Marks, back, cut, kept
from lclm.typing import Array

BUCKETS = (16, 64, 256)

Texts = Sequence[Sequence[int]] | np.ndarray


def pieces(tokens: int, chunk: int) -> list[int]:
    """Static call widths that cover `tokens`: whole chunks, then the nearest bucket."""
    whole, tail = divmod(tokens, chunk)
    sizes = [chunk] * whole
    if tail:
        sizes.append(min([b for b in BUCKETS if tail <= b < chunk], default=chunk))
    return sizes


def roomy(tokens: int) -> int:
    """The next multiple of 16, and of an eighth of the power of two below `tokens`."""
    step = max(16, 1 << max(tokens.bit_length() - 4, 0))
    return -(-tokens // step) * step


class Session:
    """Rows of one batch, the caches they filled, and how far each has been read."""

    def __init__(
        self, engine: Engine, policy: CachePolicy, *, rows: int, length: int, chunk: int
    ):
        """Allocate for `rows` rows of `length` tokens, `chunk` read at a time."""
        if chunk < 1:
            raise LclmError(f"chunk is {chunk}; it must be at least 1 token")
        if engine.params:
            model = Model(engine.name, engine.params["embed"]["table"])
            policy.verify(engine.config, model)
        policy, params = fit(policy, engine.config, engine.cache_dtype, length)
        if params is not None:
            params = jax.tree.map(jnp.asarray, params)
            engine = dataclasses.replace(engine, policy_params=params)
        self.engine, self.policy = engine, policy
        room = policy.overflow.room if policy.overflow else None
        self.chunk = chunk if room is None else min(chunk, room)
        self.length = length
        self._check(rows, length)
        self.caches: tuple[Any, ...] = self._states(rows, length)
        self.start = np.zeros(rows, np.int32)
        self.last = jnp.zeros((rows, engine.config.width), engine.dtype)
        self.marks = Marks()
        self.free = None  # room each row has left before it overflows
        if policy.overflow is not None:
            most = policy.kept - len(policy.overflow.tokens)
            self.free = np.full(rows, most, np.int32)

    @property
    def rows(self) -> int:
        """Batch size."""
        return len(self.start)

    def fork(self) -> "Session":
        """An independent copy: what it reads leaves this one as it is."""
        twin = object.__new__(Session)
        twin.__dict__.update(self.__dict__)
        twin.caches = jax.tree.map(jnp.copy, self.caches)
        twin.last = jnp.copy(self.last)
        twin.start = self.start.copy()
        twin.marks = Marks()
        return twin

    def mark(self) -> Mark:
        """This place, to come back to by `rollback`; see `Mark` for what it holds."""
        return self.marks.made(
            caches=kept(self.engine.config, self.policy, self.caches),
            last=jnp.copy(self.last),
            start=self.start.copy(),
            free=None if self.free is None else self.free.copy(),
            length=self.length,
        )

    def rollback(self, mark: Mark) -> None:
        """Back to a mark of this session; it stays, younger ones are dropped."""
        self.marks.drop_behind(mark)
        self.caches = back(self.engine.config, self.policy, self.caches, mark)
        self.last = jnp.copy(mark.last)
        self.start, self.length = mark.start.copy(), mark.length
        self.free = None if mark.free is None else mark.free.copy()

    def resume(self, rows: Texts, length: int) -> None:
        """Read rows behind the first `length` tokens, in place of what stands there."""
        if not 0 < length <= self.start.min() or not all(len(row) for row in rows):
            raise LclmError(
                f"resuming behind {length} tokens: 1 to {self.start.min()} were read, "
                "and every row needs a token to go on with"
            )
        self.caches = cut(self.engine.config, self.policy, self.caches, length)
        self.start = np.full_like(self.start, length)
        self.marks = Marks()
        self.read(rows)

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens; stored slots keep their places.

        Room grows to one of eight sizes an octave: a text read token by token meets
        few shapes, and so few compiled programs.
        """
        if length > self.length:
            self._check(self.rows, length)
            limit = getattr(self.policy, "limit", None)
            self._widen(min(roomy(length), limit or roomy(length)))

    def settle(self) -> None:
        """The prompt has been read whole: cut it, where the policy does so then."""
        if not self.policy.settles:
            return
        read = int(self.start.max())
        self.caches = calls.settle(self.caches, how=self.how, read=read)
        self.policy = self.policy.settled(read)
        self.marks = Marks()
        self._widen(self.length)

    def _widen(self, length: int) -> None:
        def widen(old: Array, new: jax.ShapeDtypeStruct) -> Array:
            pads = [
                (0, max(0, n - o)) for o, n in zip(old.shape, new.shape, strict=True)
            ]
            empty = -1 if jnp.issubdtype(old.dtype, jnp.signedinteger) else 0
            return (
                jnp.pad(old, pads, constant_values=empty)
                if any(p for _, p in pads)
                else old
            )

        shapes = jax.eval_shape(lambda: self._states(self.rows, length))
        self.caches = jax.tree.map(widen, self.caches, shapes)
        self.length = length

    def read(self, rows: Texts) -> None:
        """Read more tokens of every row (rows may differ in length)."""
        total = jnp.asarray(self.start + [len(r) for r in rows], jnp.int32)
        for tokens, count in self._chunks(rows):
            chunk = Chunk(tokens, jnp.asarray(self.start), jnp.asarray(count), total)
            self.caches, self.last = calls.read_last(
                self.engine.weights, self.caches, self.last, chunk, how=self.how
            )
            self._advance(count)
            if jax.default_backend() == "cpu":
                # A CPU allocates a call's room to work in when the call is dispatched:
                # calls dispatched ahead would hold theirs beside one another.
                jax.block_until_ready(self.last)

    def nll(
        self, rows: np.ndarray, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """float32 [B, T-1]: each token's loss given those before it."""
        losses, done = [], 0
        total = jnp.asarray(self.start + rows.shape[1] - 1, jnp.int32)
        for tokens, count in self._chunks(rows[:, :-1]):
            targets = np.zeros(tokens.shape, np.int32)
            real = rows[:, done + 1 : done + 1 + tokens.shape[1]]
            targets[:, : real.shape[1]] = real
            chunk = Chunk(tokens, jnp.asarray(self.start), jnp.asarray(count), total)
            self.caches, self.last, nll = calls.read_nll(
                self.engine.weights,
                self.caches,
                self.last,
                targets,
                chunk,
                how=self.how,
            )
            losses.append(np.asarray(nll[:, : int(count[0])]))
            self._advance(count)
            done += int(count[0])
            if progress is not None:
                progress(done)
        return np.concatenate(losses, 1)

    def score(self, rows: Texts) -> tuple[np.ndarray, np.ndarray]:
        """(float32, bool) [B, T]: each token's loss, and if greedy decoding makes it.

        The tokens are read. Rows may differ in length, T is the longest; behind a row's
        end both are noise. The first token is scored by what was read before it.
        """
        found = []
        lengths = np.array([len(r) for r in rows], np.int32)
        total = jnp.asarray(self.start + lengths)
        for tokens, count in self._chunks(rows):
            chunk = Chunk(tokens, jnp.asarray(self.start), jnp.asarray(count), total)
            self.caches, self.last, *scores = calls.read_scored(
                self.engine.weights, self.caches, self.last, chunk, how=self.how
            )
            found.append([np.asarray(x) for x in scores])
            self._advance(count)
        nll, greedy = (np.concatenate(x, 1) for x in zip(*found, strict=True))
        return nll[:, : lengths.max()], greedy[:, : lengths.max()]

    def decode(
        self,
        active: np.ndarray,
        keys: Array,
        *,
        sampler: Sampler,
        limit: int,
        steps: int,
        eos: tuple[int, ...],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Up to `limit` more tokens of active rows -> (tokens [B, limit], active)."""
        if self.free is not None:
            self._make_room(np.ones(self.rows, np.int32))
            limit = int(self.free[active].min(initial=limit))
        rows, out = calls.decode(
            self.engine.weights,
            Rows(self.caches, self.last, jnp.asarray(self.start), jnp.asarray(active)),
            keys,
            jnp.int32(limit),
            jnp.asarray(eos or (-1,), jnp.int32),
            how=self.how,
            sampler=sampler,
            steps=steps,
        )
        self.caches, self.last = rows.caches, rows.hidden
        self._advance(np.asarray(rows.start) - self.start)
        return np.asarray(out)[:, :limit], np.asarray(rows.active)

    def _chunks(self, rows: Texts):
        """Left-aligned pieces of all rows: (tokens [B, T], count [B])."""
        lengths = np.array([len(r) for r in rows], np.int32)
        sizes = pieces(int(lengths.max()), self.chunk)
        self.reserve(int((self.start + lengths).max()))
        done = 0
        for size in sizes:
            count = np.clip(lengths - done, 0, size).astype(np.int32)
            tokens = np.zeros((len(rows), size), np.int32)
            for b, row in enumerate(rows):
                tokens[b, : count[b]] = row[done : done + count[b]]
            self._make_room(np.maximum(count, 1))
            yield tokens, count
            done += size

    def _make_room(self, tokens: np.ndarray) -> None:
        """The overflow step of rows that `tokens` [B] more would not fit into."""
        if self.free is None or not (full := tokens > self.free).any():
            return
        overflow = self.policy.overflow
        catalyst = np.tile(np.asarray(overflow.tokens, np.int32), (self.rows, 1))
        start = jnp.asarray(self.start)
        count = jnp.where(full, catalyst.shape[1], 0)
        chunk = Chunk(catalyst, start, count, start + count)
        self.caches = calls.overflow(
            self.engine.weights, self.caches, jnp.asarray(full), chunk, how=self.how
        )
        self.free = np.where(full, overflow.room, self.free)

    def _advance(self, count: np.ndarray) -> None:
        """`count` [B] more tokens of each row have been read or made."""
        self.start = self.start + count
        if self.free is not None:
            self.free = self.free - count

    @property
    def how(self) -> How:
        """What this session's compiled calls are specialised on."""
        engine = self.engine
        return How(engine.config, self.policy, engine.dtype, engine.spread)

    def _states(self, rows: int, length: int) -> tuple[Any, ...]:
        engine = self.engine
        return init_states(engine.config, self.policy, rows, length, engine.cache_dtype)

    def _check(self, rows: int, length: int) -> None:
        limit = getattr(self.policy, "limit", None)
        if limit is not None and length > limit:
            raise LclmError(
                f"{length} tokens do not fit a full cache of limit={limit}; raise the "
                "limit, shorten the prompt, or use a bounded policy such as "
                "'streaming:sinks=4,window=1020'"
            )
        engine = self.engine
        need = state_bytes(engine.config, self.policy, rows, length, engine.cache_dtype)
        memory.require(
            need,
            f"the cache of {rows} x {length} tokens",
            "shorten the text, use fewer rows, or a bounded policy such as "
            "'streaming:sinks=4,window=1020'",
        )
