"""Laws of Locret: scores of single tokens, what is protected, whose heads they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import cache as policies
from lclm.cache.base import KV, Cache, Heads, Layer
from lclm.cache.locret import Locret, draw
from lclm.cache.step import make_step
from lclm.config import AttentionSpec, RopeSpec
from lclm.errors import LclmError
from lclm.learned import Extra, save_extra, shape
from lclm.ops.retaining import scores
from tests.tiny import tiny_config

SPEC = AttentionSpec(4, 2, 8, RopeSpec(context=64))
LAYER = Layer(0, SPEC)
LENGTH = 30
NEAR = Locret(budget=10, stabilizers=3, local=0)
SLOT = dataclasses.replace(NEAR, positions="slot")


@functools.cache
def own() -> dict:
    """Random heads of one layer, strong enough that scores differ."""
    found = draw((LAYER,), "random:3")
    return {name: np.float32(4 * leaf[0]) for name, leaf in found.items()}


@functools.cache
def text(length: int = LENGTH) -> Heads:
    keys = jax.random.split(jax.random.key(3), 3)
    sizes = (SPEC.heads, SPEC.kv_heads, SPEC.kv_heads)
    return Heads(
        *(
            jax.random.normal(k, (1, length, n, SPEC.head_dim))
            for k, n in zip(keys, sizes, strict=True)
        )
    )


@functools.cache
def alone() -> np.ndarray:
    """Scores [K, T] of the whole text in one go."""
    heads, w1, w2 = text(), *map(jnp.asarray, (own()["w1"], own()["w2"]))
    return np.asarray(scores(heads.q, heads.k, heads.v, w1, w2)[0]).T


@functools.partial(jax.jit, static_argnames="policy")
def call(policy: Locret, cache, part: Heads, at):
    """One call's output, and the cache behind it."""
    positions = at + jnp.arange(part.q.shape[1], dtype=jnp.int32)[None]
    params = jax.tree.map(jnp.asarray, (own(), own()))
    step = make_step(tiny_config(), positions, start=at[None], policy=params)
    return policy.attend(cache, part, step, LAYER)


@functools.cache
def run(policy: Locret, chunk: int):
    """Attention over the text, and the cache after each call."""
    heads, cache = text(), policy.init(LAYER, 1, LENGTH, jnp.float32)
    outs, caches = [], []
    for at in range(0, LENGTH, chunk):
        end = min(at + chunk, LENGTH)
        part = Heads(*(x[:, at:end] for x in (heads.q, heads.k, heads.v)))
        out, cache = call(policy, cache, part, jnp.int32(at))
        outs.append(out)
        caches.append((end, cache))
    return np.asarray(jnp.concatenate(outs, 1)), caches


@functools.cache
def dense() -> np.ndarray:
    return run_dense(np.ones((SPEC.kv_heads, LENGTH, LENGTH), bool))


def run_dense(
    seen: np.ndarray, slots: np.ndarray | None = None, first: int = 0
) -> np.ndarray:
    """Attention written out; seen [K, T, T]; slots [K, T, T]: keys' positions then."""
    heads = jax.tree.map(lambda x: np.asarray(x[0], np.float64), text())
    at = np.broadcast_to(np.arange(LENGTH), seen.shape) if slots is None else slots
    out = np.zeros((1, LENGTH, SPEC.heads, SPEC.head_dim))
    for i in range(first, LENGTH):
        for head in range(SPEC.heads):
            kv = head // (SPEC.heads // SPEC.kv_heads)
            keys = [j for j in range(i + 1) if seen[kv, i, j]]
            k = turn(heads.k[keys, kv], at[kv, i, keys])
            q = turn(heads.q[[i], head], at[kv, i, [i]])
            logits = k @ q[0] * SPEC.head_dim**-0.5
            p = np.exp(logits - logits.max())
            out[0, i, head] = p / p.sum() @ heads.v[keys, kv]
    return out


def turn(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows [S, H] rotated to positions [S], halves paired."""
    half = SPEC.head_dim // 2
    angle = at[:, None] * SPEC.rope.theta ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], 1)


def by_hand(budget: int, chunk: int, last: int) -> np.ndarray:
    """Kept positions [calls][K] of the paper's rule, the last tokens always staying."""
    kept, found = [[] for _ in range(SPEC.kv_heads)], []
    for at in range(0, LENGTH, chunk):
        end = min(at + chunk, LENGTH)
        for kv in range(SPEC.kv_heads):
            slots = [*kept[kv], *range(at, end)]
            rank = {p: np.inf if p >= end - last else alone()[kv, p] for p in slots}
            best = sorted(slots, key=lambda p: (-rank[p], p))[:budget]
            kept[kv] = sorted(best)
        found.append([list(k) for k in kept])
    return found


@pytest.mark.parametrize("positions", ["absolute", "slot"])
@pytest.mark.parametrize(("chunk", "last"), [(1, 0), (10, 9), (LENGTH, 0)])
def test_a_budget_of_the_whole_text_is_full_attention(positions, chunk, last):
    policy = Locret(budget=LENGTH, stabilizers=last, positions=positions)
    np.testing.assert_allclose(run(policy, chunk)[0], dense(), atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 10])
def test_scores_travel_with_their_slots_and_never_change(chunk):
    _, caches = run(NEAR, chunk)
    for _, cache in caches:
        pos, kv = np.asarray(cache.groups[0].pos[0]), cache.groups[0]
        for head in range(SPEC.kv_heads):
            held = pos[head] >= 0
            at = pos[head][held]
            score = np.asarray(cache.extra["score"])[0, head][held]
            np.testing.assert_allclose(score, alone()[head, at], atol=1e-5)
            values = np.asarray(kv.v)[0, head][held]
            np.testing.assert_array_equal(values, np.asarray(text().v)[0, at, head])


@pytest.mark.parametrize(
    ("policy", "chunk"),
    [(NEAR, 10), (SLOT, 10), (NEAR, 1), (SLOT, 1), (NEAR, LENGTH)],
)
def test_each_call_keeps_the_last_tokens_and_the_best_of_the_rest(policy, chunk):
    """A chunk shorter than `stabilizers` protects older slots too."""
    _, caches = run(policy, chunk)
    wanted = by_hand(10, chunk, 3)
    for (end, cache), want in zip(caches, wanted, strict=True):
        for head, pos in enumerate(np.asarray(cache.groups[0].pos[0])):
            found = pos[pos >= 0].tolist()
            assert sorted(found) == want[head]
            if chunk > 1 or policy is SLOT:
                assert found == want[head]
            assert len(found) == min(10, end)
            assert {*range(max(0, end - 3), end)} <= set(found)


def test_slot_positions_are_those_of_the_kept_tokens_in_order():
    chunk = 10
    kept = [[[] for _ in range(SPEC.kv_heads)], *by_hand(10, chunk, 3)]
    seen = np.zeros((SPEC.kv_heads, LENGTH, LENGTH), bool)
    slots = np.zeros(seen.shape, np.int64)
    for i in range(LENGTH):
        for kv in range(SPEC.kv_heads):
            keys = [*kept[i // chunk][kv], *range(i // chunk * chunk, i + 1)]
            seen[kv, i, keys] = True
            slots[kv, i, keys] = np.arange(len(keys))
    want = run_dense(seen, slots)
    np.testing.assert_allclose(run(SLOT, chunk)[0], want, atol=2e-5)
    np.testing.assert_allclose(run(NEAR, chunk)[0], run_dense(seen), atol=2e-5)
    assert np.abs(run(NEAR, chunk)[0] - want).max() > 1e-3


def test_a_prompt_that_is_cut_once_protects_its_local_tail_alone():
    policy = Locret(budget=10, stabilizers=8, local=2, at="end")
    _, caches = run(policy, 10)
    pos = np.asarray(policy.settle(caches[-1][1], LAYER, LENGTH).groups[0].pos[0])
    for head in range(SPEC.kv_heads):
        rank = alone()[head].copy()
        rank[-2:] = np.inf
        assert pos[head].tolist() == sorted(np.argsort(-rank)[:10].tolist())


@pytest.mark.parametrize("positions", ["absolute", "slot"])
def test_what_follows_a_cut_prompt_is_kept_behind_it(positions):
    read, budget = 20, 10
    policy = Locret(budget=budget, local=2, at="end", positions=positions)
    end, cache = run(policy, 10)[1][1]
    assert end == read
    whole = jax.tree.map(lambda x: x[:, :, :read], cache)
    cut = policy.settle(whole, LAYER, read)
    (kv,) = cut.groups
    kept = np.asarray(kv.pos[0])
    pad = policy.settled(read).capacity(LAYER, LENGTH) - budget
    room = [(0, 0), (0, 0), (0, pad), (0, 0)]
    kv = KV(
        jnp.pad(kv.k, room),
        jnp.pad(kv.v, room),
        jnp.pad(kv.pos, room[:3], constant_values=-1),
    )
    part = Heads(*(x[:, read:] for x in (text().q, text().k, text().v)))
    cut = Cache((kv,), cut.extra)
    out, _ = call(policy.settled(read), cut, part, jnp.int32(read))
    seen = np.zeros((SPEC.kv_heads, LENGTH, LENGTH), bool)
    slots = np.zeros(seen.shape, np.int64)
    for i in range(read, LENGTH):
        for head in range(SPEC.kv_heads):
            keys = [*kept[head], *range(read, i + 1)]
            seen[head, i, keys] = True
            at = keys if positions == "absolute" else np.arange(len(keys))
            slots[head, i, keys] = at
    want = run_dense(seen, slots, first=read)
    np.testing.assert_allclose(out[0], want[0, read:], atol=2e-5)


def test_heads_of_the_model_are_found_and_others_are_refused(tmp_path, monkeypatch):
    config, three = tiny_config(), tiny_config(windows=(None, None, None))
    fits = {
        "w1": np.full((2, 16, 64), 0.1, np.float32),
        "w2": np.full((2, 2, 16), 0.1, np.float32),
    }
    path = save_extra(tmp_path, Extra("locret_heads", "tiny", fits, shape(config)))
    policy, params = Locret(heads=str(path)).resolve(config)
    assert policy.heads == str(path) and len(params) == 2
    assert params[0]["w1"].dtype == np.float32
    np.testing.assert_allclose(params[1]["w2"], 0.1, atol=1e-4)
    monkeypatch.setattr("lclm.learned.FOLDER", tmp_path)
    np.testing.assert_array_equal(Locret().resolve(config)[1][0]["w1"], params[0]["w1"])
    with pytest.raises(LclmError, match=r"locret_heads for tiny, but.*layers 3"):
        Locret().resolve(three)
    with pytest.raises(LclmError, match=r"locret_heads of 'tiny'.*layers 3"):
        Locret(heads=str(path)).resolve(three)
    with pytest.raises(LclmError, match="no such file"):
        Locret(heads="nowhere.safetensors").resolve(config)


def test_random_heads_are_the_same_for_the_same_seed():
    config = tiny_config()
    one, two, same = (
        Locret(heads=h).resolve(config)[1][1]["w1"]
        for h in ("random:1", "random:2", "random:1")
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - two).max() > 0.01
    with pytest.raises(LclmError, match="random:SEED"):
        Locret(heads="random:x").resolve(config)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("locret:budget=8,stabilizers=9", "below the 9 tokens it protects"),
        ("locret:budget=8,local=9,at=end", "below the 9 tokens it protects"),
        ("locret:recent=4", "stabilizers="),
        ("locret:local=-1", "at least 0"),
        ("locret:positions=cycle", "slot"),
        ("locret:positions=slot,bits=4", "positions=absolute"),
        ("locret:stabilisers=3", "did you mean 'stabilizers'"),
    ],
)
def test_options_that_cannot_be_are_refused(policy, says):
    with pytest.raises(LclmError, match=says):
        policies.make(policy)
