"""Driving a model through a cache: chunked reading, overflow steps, decoding.

All shapes are static: rows are read left-aligned in chunks of one size (the tail in a
smaller bucket), padded on the right with positions of -1 that no cache keeps.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lclm.blocks.layer import each_cache, init_states, state_bytes
from lclm.cache.base import Cache, CachePolicy, Layer, layers_of
from lclm.config import ModelConfig
from lclm.errors import LclmError
from lclm.models.decoder import Decoder, loss_table, unembed
from lclm.ops.loss import token_nll
from lclm.ops.sampling import Sampler, sample
from lclm.serve import memory
from lclm.typing import Array, Leaf, Params

BUCKETS = (16, 64, 256)
NLL_TOKENS = 128  # rows of logits held at a time

Texts = Sequence[Sequence[int]] | np.ndarray


@dataclass(frozen=True)
class Engine:
    """What does not change between sessions: the model and how it is run.

    `dtype` is the type of activations; `cache_dtype` that of stored keys and values.
    `policy_params` is what a policy with `needs.params` brought, one item per layer.
    """

    config: ModelConfig
    params: Params
    dtype: Any
    cache_dtype: Any
    policy_params: Any = None

    @property
    def weights(self) -> dict[str, Any]:
        """The arrays every compiled call takes."""
        return {"model": self.params, "policy": self.policy_params}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer as policies know it."""
        return layers_of(self.config)


@dataclass(frozen=True)
class How:
    """What a compiled call is specialised on."""

    config: ModelConfig
    policy: CachePolicy
    dtype: Any

    def forward(
        self, weights, caches, tokens, positions, *, start, length, weigh=False
    ):
        """Final hidden states of a chunk, and the caches behind it."""
        return Decoder(self.config, self.policy, dtype=self.dtype).apply(
            {"params": weights["model"]},
            tokens,
            positions,
            caches=caches,
            start=start,
            length=length,
            policy_params=weights["policy"],
            weigh=weigh,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """Tokens [B, T] to read: `count` [B] of them real, behind `start` [B] others.

    `length` [B] is what dynamic RoPE types resolve with.
    """

    tokens: Leaf
    start: Leaf
    count: Leaf
    length: Leaf

    @property
    def positions(self) -> Array:
        """int32 [B, T], -1 for padding."""
        offset = lax.iota(jnp.int32, self.tokens.shape[1])[None]
        return jnp.where(offset < self.count[:, None], self.start[:, None] + offset, -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Rows being decoded: caches, final hidden states [B, D], lengths, which go on."""

    caches: Leaf
    hidden: Leaf
    start: Leaf
    active: Leaf


def _forward(weights, caches, chunk: Chunk, how: How, *, weigh: bool = False):
    return how.forward(
        weights,
        caches,
        chunk.tokens,
        chunk.positions,
        start=chunk.start,
        length=chunk.length,
        weigh=weigh,
    )


@functools.partial(jax.jit, static_argnames="how", donate_argnames=("caches", "last"))
def _read_last(weights, caches, last, chunk: Chunk, *, how: How):
    """Read a chunk; `last` takes the final hidden state of rows that ended in it."""
    hidden, caches = _forward(weights, caches, chunk, how)
    if how.policy.needs.nll:
        before = jnp.concatenate([last[:, None], hidden[:, :-1]], 1)
        own = _losses(weights, before, chunk.tokens, how)
        caches = _observe(caches, own, chunk.positions, how)
    return caches, _final(hidden, last, chunk)


@functools.partial(jax.jit, static_argnames="how", donate_argnames=("caches", "last"))
def _read_nll(weights, caches, last, targets, chunk: Chunk, *, how: How):
    """Read a chunk and return each token's loss of predicting `targets`."""
    hidden, caches = _forward(weights, caches, chunk, how)
    nll = _losses(weights, hidden, targets, how)
    if how.policy.needs.nll:
        first = _losses(weights, last[:, None], chunk.tokens[:, :1], how)
        own = jnp.concatenate([first, nll[:, :-1]], 1)
        caches = _observe(caches, own, chunk.positions, how)
    return caches, _final(hidden, last, chunk), nll


def _final(hidden, last, chunk: Chunk) -> Array:
    """The final hidden state of each row: `last` where the chunk had none of it."""
    at = jnp.maximum(chunk.count - 1, 0)[:, None, None]
    here = jnp.take_along_axis(hidden, at, 1)[:, 0]
    return jnp.where(chunk.count[:, None] > 0, here, last)


def _losses(weights, hidden, targets, how: How) -> Array:
    return token_nll(
        hidden,
        loss_table(how.config, weights["model"], how.dtype),
        targets,
        chunk=NLL_TOKENS,
        softcap=how.config.final_softcap,
    )


def _observe(caches, own, positions, how: How):
    """Tell the policy the loss of each token at `positions`; a row's first has none."""
    own = jnp.where(positions > 0, own, 0.0)
    return each_cache(
        how.config, caches, lambda cache, _: how.policy.observe(cache, own, positions)
    )


@functools.partial(jax.jit, static_argnames="how", donate_argnames="caches")
def _overflow(weights, caches, full, chunk: Chunk, *, how: How):
    """Rows that are `full` weigh a catalyst, kept by none of them, then compact."""
    weighed = caches
    if chunk.tokens.shape[1]:
        # The catalyst is no part of the text: recurrent states forget it.
        _, weighed = _forward(weights, caches, chunk, how, weigh=True)

    def changed(cache: Cache, layer: Layer) -> Cache:
        made = how.policy.compact(weighed[layer.index], layer)
        if len(full) == 1:
            return made
        return jax.tree.map(
            lambda new, old: jnp.where(
                full.reshape(-1, *[1] * (old.ndim - 1)), new, old
            ),
            made,
            cache,
        )

    return each_cache(how.config, caches, changed)


@functools.partial(jax.jit, static_argnames=("how", "read"))
def _settle(caches, *, how: How, read: int):
    """Cut caches that hold prompts of up to `read` tokens whole."""
    return each_cache(
        how.config, caches, lambda cache, layer: how.policy.settle(cache, layer, read)
    )


@functools.partial(
    jax.jit, static_argnames=("how", "sampler", "steps"), donate_argnames="rows"
)
def _decode(weights, rows: Rows, keys, limit, eos, *, how: How, sampler, steps):
    """Up to `limit` <= `steps` tokens a row in one loop; -1 where a row has ended."""

    def body(state):
        i, rows, out = state
        logits = unembed(how.config, weights["model"], rows.hidden)
        draw = jax.vmap(jax.random.fold_in)(keys, rows.start)
        token = sample(logits, draw, sampler)
        active = rows.active & ~jnp.any(token[:, None] == eos[None], 1)
        positions = jnp.where(active, rows.start, -1)[:, None]
        out = lax.dynamic_update_slice(
            out, jnp.where(active, token, -1)[:, None], (0, i)
        )
        h, caches = how.forward(
            weights,
            rows.caches,
            token[:, None],
            positions,
            start=rows.start,
            length=rows.start + 1,
        )
        if how.policy.needs.nll:
            logp = jax.nn.log_softmax(logits)
            own = -jnp.take_along_axis(logp, token[:, None], 1)
            caches = _observe(caches, own, positions, how)
        hidden = jnp.where(active[:, None], h[:, 0], rows.hidden)
        return i + 1, Rows(caches, hidden, rows.start + active, active), out

    def more(state):
        return (state[0] < limit) & jnp.any(state[1].active)

    out = jnp.full((len(keys), steps), -1, jnp.int32)
    _, rows, out = lax.while_loop(more, body, (jnp.int32(0), rows, out))
    return rows, out


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
        policy = policy.fitted(engine.config, engine.cache_dtype, length)
        policy, params = policy.resolve(engine.config)
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
        return twin

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
        self.caches = _settle(self.caches, how=self.how, read=read)
        self.policy = self.policy.settled(read)
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
            self.caches, self.last = _read_last(
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
            self.caches, self.last, nll = _read_nll(
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
        rows, out = _decode(
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
        self.caches = _overflow(
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
        return How(self.engine.config, self.policy, self.engine.dtype)

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


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def dense_logits(params, tokens, *, config, dtype) -> Array:
    """float32 [B, T, V] of a dense parallel pass."""
    hidden, _ = Decoder(config, dtype=dtype).apply({"params": params}, tokens)
    return unembed(config, params, hidden)
