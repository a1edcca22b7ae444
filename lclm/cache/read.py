"""Reading a cache: attention over slots merged with attention inside the call."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from lclm.cache import write
from lclm.cache.base import KV, Cache, Evidence, Heads, Layer, Needs
from lclm.cache.step import Step
from lclm.ops.masked import masked_attention, step_attention
from lclm.ops.precision import wide
from lclm.typing import Array, Leaf
from pallas_kernels import mask as masks
from pallas_kernels.attention import attention, merge
from pallas_kernels.decode import (
    attention_and_sums,
    cached_attention,
    column_sums,
)


def new_tokens(heads: Heads, step: Step, layer: Layer, *, rotated: bool = True) -> KV:
    """A call's keys and values in slot-major form, with their positions."""
    k = step.rotate(heads.k, layer.spec.rope) if rotated else heads.k
    return KV(
        jnp.swapaxes(k, 1, 2),
        jnp.swapaxes(heads.v, 1, 2),
        step.positions[:, None],
    )


def stored_keys(kv: KV, step: Step, layer: Layer) -> Leaf:
    """Keys of the slots as attention wants them: rotated now if the angles can move."""
    rope = layer.spec.rope
    if rope is None or not rope.dynamic:
        return kv.k
    rotated = step.rotate_to(jnp.swapaxes(kv.k, 1, 2), kv.pos[:, 0], rope)
    return jnp.swapaxes(rotated, 1, 2)


def absolute(
    cache: Cache,
    heads: Heads,
    step: Step,
    layer: Layer,
    sink: Array | None,
    needs: Needs,
) -> tuple[Array, Evidence, KV]:
    """Attention with every token at its own position, over one head group.

    Returns the output, the evidence a policy asked for, and the call's tokens as they
    are to be stored (unrotated where the layer's RoPE depends on the length).
    """
    spec, (kv,) = layer.spec, cache.groups
    q = step.rotate(heads.q, spec.rope)
    new = new_tokens(heads, step, layer)
    old_keys = stored_keys(kv, step, layer)
    mass = None
    if layer.mask is not None:
        past = under_mask(q, dataclasses.replace(kv, k=old_keys), step, layer)
        inside = under_mask(q, new, step, layer)
    else:
        inside = within_call(q, new, step, layer, window=spec.window)
        if needs.last and q.shape[1] == 1:
            *both, mass = with_mass(q, old_keys, kv, inside, sink, step, layer)
            past = both[0], both[1]
        else:
            past = over_slots(q, old_keys, kv, step, layer, window=spec.window)
    out, lse = combine([past, inside], sink)
    evidence = _evidence(q, old_keys, kv, new, lse, heads, step, layer, needs, mass)
    if spec.rope is not None and spec.rope.dynamic:
        new = new_tokens(heads, step, layer, rotated=False)
    return out, evidence, new


def over_slots(
    q: Array, keys: Leaf, kv: KV, step: Step, layer: Layer, *, window: int | None
) -> tuple[Array, Array]:
    """(out, lse) of the call's queries over stored slots."""
    return cached_attention(
        q,
        keys,
        kv.v,
        step.positions,
        kv.pos,
        window=window,
        scale=layer.spec.scale,
        softcap=layer.spec.softcap,
        length=_used(kv, step),
    )


def _used(kv: KV, step: Step) -> Array:
    """Slots [B] from which on a row has none."""
    return jnp.minimum(step.start, kv.k.shape[2])


def with_mass(
    q: Array,
    keys: Leaf,
    kv: KV,
    inside: tuple[Array, Array],
    sink: Array | None,
    step: Step,
    layer: Layer,
) -> tuple[Array, Array, Array]:
    """(out, lse) of single tokens over stored slots, and what each slot gets of them.

    `inside` is their attention to themselves, which with `sink` is in the denominators
    of the column sums.
    """
    beside = inside[1]
    if sink is not None:
        beside = jnp.logaddexp(beside, wide(sink)[None, :, None])
    return attention_and_sums(
        q,
        keys,
        kv.v,
        step.positions,
        kv.pos,
        beside,
        window=layer.spec.window,
        scale=layer.spec.scale,
        softcap=layer.spec.softcap,
        length=_used(kv, step),
    )


def under_mask(q: Array, kv: KV, step: Step, layer: Layer) -> tuple[Array, Array]:
    """(out, lse) over the slots that the layer's static pattern shows.

    One token reads those alone, if the cache keeps everything: also what no later
    query sees, because a stripe of one kv head is in no other's.
    """
    attend = step_attention if q.shape[1] == 1 else masked_attention
    return attend(
        q,
        kv.k,
        kv.v,
        step.positions,
        kv.pos,
        mask=layer.mask,
        scale=layer.spec.scale,
        softcap=layer.spec.softcap,
    )


def sinks_and_band(
    cache: Cache, heads: Heads, step: Step, layer: Layer, sink: Array | None
) -> tuple[Array, Cache]:
    """Attention of a layer with sinks and a window, and the slots behind it.

    The cache holds the sinks, and beside them a ring of the last window - 1 tokens.
    """
    spec, (first, recent) = layer.spec, cache.groups
    q = step.rotate(heads.q, spec.rope)
    new = kept = new_tokens(heads, step, layer)
    if spec.rope is not None and spec.rope.dynamic:
        kept = new_tokens(heads, step, layer, rotated=False)
    first = write.head(first, kept, step)
    seen = dataclasses.replace(first, k=stored_keys(first, step, layer))
    keys = stored_keys(recent, step, layer)
    parts = [
        over_slots(q, keys, recent, step, layer, window=spec.window),
        within_call(q, new, step, layer, window=spec.window, first=spec.sinks),
        over_all(q, seen, step, layer),
    ]
    out, _ = combine(parts, sink)
    recent = write.ring(recent, kept, step.after(out), spec.sinks)
    return out, Cache((first, recent), cache.extra)


def over_all(q: Array, kv: KV, step: Step, layer: Layer) -> tuple[Array, Array]:
    """(out, lse) over every stored slot no later than the query."""
    shared = {"scale": layer.spec.scale, "softcap": layer.spec.softcap}
    return cached_attention(q, kv.k, kv.v, step.positions, kv.pos, **shared)


def within_call(
    q: Array, new: KV, step: Step, layer: Layer, *, window: int | None, first: int = 0
) -> tuple[Array, Array]:
    """(out, lse) of the call's queries over its own tokens from position `first` on."""
    if q.shape[1] == 1:
        return _itself(q, new, step, layer, first)
    mask = masks.causal()
    if window is not None and window < q.shape[1]:
        mask = mask & masks.window(window)
    q_ids = jnp.where(step.valid, 1, 0)
    kv_ids = jnp.where(step.positions >= jnp.maximum(first, 0), 1, -1)
    return attention(
        q,
        jnp.swapaxes(new.k, 1, 2),
        jnp.swapaxes(new.v, 1, 2),
        mask=mask,
        scale=layer.spec.scale,
        softcap=layer.spec.softcap,
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
    )


def _itself(
    q: Array, new: KV, step: Step, layer: Layer, first: int
) -> tuple[Array, Array]:
    """A single token's attention to itself: its value, weighed by its own score."""
    _, _, heads, size = q.shape
    group = heads // new.k.shape[1]
    scale = size**-0.5 if layer.spec.scale is None else layer.spec.scale
    k, v = (jnp.repeat(x[:, :, 0], group, 1) for x in (new.k, new.v))
    score = jnp.sum(wide(q[:, 0]) * wide(k), -1) * scale
    if layer.spec.softcap is not None:
        score = layer.spec.softcap * jnp.tanh(score / layer.spec.softcap)
    lse = jnp.where(step.positions >= jnp.maximum(first, 0), score, -jnp.inf)
    return v[:, None].astype(q.dtype), lse[..., None]


def combine(
    parts: list[tuple[Array, Array]], sink: Array | None
) -> tuple[Array, Array]:
    """Merge partial attentions; a learned sink adds exp(sink) to the denominator."""
    out, lse = merge([o for o, _ in parts], [s for _, s in parts])
    if sink is None:
        return out, lse
    total = jnp.logaddexp(lse, wide(sink)[None, :, None])
    weight = jnp.exp(lse - total)
    scaled = wide(out) * jnp.swapaxes(weight, 1, 2)[..., None]
    return scaled.astype(out.dtype), total


def _evidence(
    q: Array,
    old_keys: Leaf,
    kv: KV,
    new: KV,
    lse: Array,
    heads: Heads,
    step: Step,
    layer: Layer,
    needs: Needs,
    mass_old: Array | None,
) -> Evidence:
    mass_new = None
    if needs.last:
        q_last, lse_last, at = _last_queries(q, lse, step, needs.last)
        shared = {"scale": layer.spec.scale, "softcap": layer.spec.softcap}
        if mass_old is None:
            mass_old = column_sums(q_last, old_keys, lse_last, at, kv.pos, **shared)
        mass_new = column_sums(q_last, new.k, lse_last, at, new.pos, **shared)
    return Evidence(
        mass_old,
        mass_new,
        heads.q if needs.queries else None,
        heads.k if needs.keys else None,
    )


def _last_queries(
    q: Array, lse: Array, step: Step, count: int
) -> tuple[Array, Array, Array]:
    """The last `count` real queries of each row; positions -1 where there are fewer."""
    width = min(count, q.shape[1])
    at = step.count[:, None] - width + lax.iota(jnp.int32, width)[None]
    index = jnp.maximum(at, 0)
    q_last = jnp.take_along_axis(q, index[:, :, None, None], 1)
    lse_last = jnp.take_along_axis(lse, index[:, None, :], 2)
    positions = jnp.take_along_axis(step.positions, index, 1)
    return q_last, lse_last, jnp.where(at >= 0, positions, -1)
