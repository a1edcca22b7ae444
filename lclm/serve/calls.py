"""The compiled calls of a session: reading a chunk, overflow, the cut, decoding.

All shapes are static: rows are read left-aligned in chunks of one size (the tail in a
smaller bucket), padded on the right with positions of -1 that no cache keeps.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lclm.blocks.layer import each_cache
from lclm.cache.base import Cache, CachePolicy, Layer, layers_of
from lclm.config import ModelConfig
from lclm.models.decoder import Decoder, loss_table, unembed
from lclm.ops.loss import token_nll, token_scores
from lclm.ops.sampling import sample
from lclm.typing import Array, Leaf, Params
from pallas_kernels import dispatch
from pallas_kernels.decode import in_order

NLL_TOKENS = 128  # rows of logits held at a time


@dataclass(frozen=True)
class Engine:
    """What does not change between sessions: the model and how it is run.

    `dtype` is the type of activations; `cache_dtype` that of stored keys and values.
    `policy_params` is what a policy with `needs.params` brought, one item per layer.
    `name` is what the model was loaded by, if it was.
    """

    config: ModelConfig
    params: Params
    dtype: Any
    cache_dtype: Any
    policy_params: Any = None
    name: str = ""

    @property
    def weights(self) -> dict[str, Any]:
        """The arrays every compiled call takes."""
        return {"model": self.params, "policy": self.policy_params}

    @property
    def spread(self) -> bool:
        """Whether the parameters lie on several devices."""
        first = jax.tree.leaves(self.params)[:1]
        return any(isinstance(x, jax.Array) and len(x.devices()) > 1 for x in first)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer as policies know it."""
        return layers_of(self.config)


@dataclass(frozen=True)
class How:
    """What a compiled call is specialised on.

    `spread`: several devices share its arrays, which kernels cannot do.
    """

    config: ModelConfig
    policy: CachePolicy
    dtype: Any
    spread: bool = False

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


def forms(spread: bool) -> contextlib.AbstractContextManager:
    """Calls traced inside run XLA's forms, no kernels, where devices share arrays."""
    return dispatch.preferring("xla") if spread else contextlib.nullcontext()


def _traced(call: Callable) -> Callable:
    """`call` in the forms that its `how` can run."""

    @functools.wraps(call)
    def traced(*args, how: How, **settings):
        with forms(how.spread):
            return call(*args, how=how, **settings)

    return traced


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
@_traced
def read_last(weights, caches, last, chunk: Chunk, *, how: How):
    """Read a chunk; `last` takes the final hidden state of rows that ended in it."""
    hidden, caches = _forward(weights, caches, chunk, how)
    if how.policy.needs.nll:
        before = jnp.concatenate([last[:, None], hidden[:, :-1]], 1)
        own = _losses(weights, before, chunk.tokens, how)
        caches = _observe(caches, own, chunk.positions, how)
    return caches, _final(hidden, last, chunk)


@functools.partial(jax.jit, static_argnames="how", donate_argnames=("caches", "last"))
@_traced
def read_nll(weights, caches, last, targets, chunk: Chunk, *, how: How):
    """Read a chunk and return each token's loss of predicting `targets`."""
    hidden, caches = _forward(weights, caches, chunk, how)
    nll = _losses(weights, hidden, targets, how)
    if how.policy.needs.nll:
        first = _losses(weights, last[:, None], chunk.tokens[:, :1], how)
        own = jnp.concatenate([first, nll[:, :-1]], 1)
        caches = _observe(caches, own, chunk.positions, how)
    return caches, _final(hidden, last, chunk), nll


@functools.partial(jax.jit, static_argnames="how", donate_argnames=("caches", "last"))
@_traced
def read_scored(weights, caches, last, chunk: Chunk, *, how: How):
    """Read a chunk; each of its tokens' loss, and whether greedy decoding makes it."""
    hidden, caches = _forward(weights, caches, chunk, how)
    own, greedy = token_scores(
        jnp.concatenate([last[:, None], hidden[:, :-1]], 1),
        loss_table(how.config, weights["model"], how.dtype),
        chunk.tokens,
        chunk=NLL_TOKENS,
        softcap=how.config.final_softcap,
    )
    if how.policy.needs.nll:
        caches = _observe(caches, own, chunk.positions, how)
    return caches, _final(hidden, last, chunk), own, greedy


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

    def told(cache: Cache, layer: Layer) -> Cache:
        return how.policy.over(layer).observe(cache, own, positions)

    return each_cache(how.config, caches, told)


@functools.partial(jax.jit, static_argnames="how", donate_argnames="caches")
@_traced
def overflow(weights, caches, full, chunk: Chunk, *, how: How):
    """Rows that are `full` weigh a catalyst, kept by none of them, then compact."""
    weighed = caches
    if chunk.tokens.shape[1]:
        # The catalyst is no part of the text: recurrent states forget it.
        _, weighed = _forward(weights, caches, chunk, how, weigh=True)

    def changed(cache: Cache, layer: Layer) -> Cache:
        made = how.policy.over(layer).compact(weighed[layer.index], layer)
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
@_traced
def settle(caches, *, how: How, read: int):
    """Cut caches that hold prompts of up to `read` tokens whole."""

    def cut(cache: Cache, layer: Layer) -> Cache:
        return how.policy.over(layer).settle(cache, layer, read)

    return each_cache(how.config, caches, cut)


@functools.partial(
    jax.jit, static_argnames=("how", "sampler", "steps"), donate_argnames="rows"
)
@_traced
def decode(weights, rows: Rows, keys, limit, eos, *, how: How, sampler, steps):
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
        caches = in_order(caches)
        return i + 1, Rows(caches, hidden, rows.start + active, active), out

    def more(state):
        return (state[0] < limit) & jnp.any(state[1].active)

    out = jnp.full((len(keys), steps), -1, jnp.int32)
    _, rows, out = lax.while_loop(more, body, (jnp.int32(0), rows, out))
    return rows, out


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def dense_logits(params, tokens, *, config, dtype) -> Array:
    """float32 [B, T, V] of a dense parallel pass."""
    hidden, _ = Decoder(config, dtype=dtype).apply({"params": params}, tokens)
    return unembed(config, params, hidden)
