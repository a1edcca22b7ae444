"""Quest: every query reads its own pages, whatever the call it came in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import cache as policies
from lclm.blocks.attention import layer_mask
from lclm.cache.base import KV, Cache, Heads, Layer, layers_of, measured_bytes
from lclm.cache.policies import Full
from lclm.cache.quest import Quest
from lclm.cache.step import make_step
from lclm.config import AttentionSpec, RopeSpec
from lclm.errors import LclmError
from lclm.ops.rope import angles, rotate
from tests.tiny import dense_nll, tiny_config, tiny_lm, tokens

SPEC = AttentionSpec(4, 2, 8, RopeSpec(context=64))
ROWS = (30, 21)  # tokens of two rows
SMALL = Quest(budget=12, page=4, dense=0)


def random_heads(spec=SPEC) -> Heads:
    keys = jax.random.split(jax.random.key(3), 3)
    sizes = (spec.heads, spec.kv_heads, spec.kv_heads)
    return Heads(
        *(
            2 * jax.random.normal(k, (len(ROWS), max(ROWS), n, spec.head_dim))
            for k, n in zip(keys, sizes, strict=True)
        )
    )


def run(policy, heads: Heads, chunk: int, layer=None, cache=None):
    """The policy's attention over ragged rows, `chunk` tokens at a time."""
    layer = Layer(0, SPEC) if layer is None else layer
    if cache is None:
        cache = policy.init(layer, len(ROWS), max(ROWS), jnp.float32)

    @jax.jit
    def call(cache, part, positions, start):
        step = make_step(tiny_config(), positions, start=start)
        return policy.attend(cache, part, step, layer)

    outs, rows = [], np.array(ROWS)
    for at in range(0, max(ROWS), chunk):
        index = at + np.arange(chunk)
        positions = np.where(index[None] < rows[:, None], index[None], -1)
        start = jnp.asarray(np.minimum(rows, at), jnp.int32)
        held = np.minimum(index, max(ROWS) - 1)
        part = Heads(*(x[:, held] for x in (heads.q, heads.k, heads.v)))
        out, cache = call(cache, part, jnp.asarray(positions, jnp.int32), start)
        outs.append(np.asarray(out))
    return np.concatenate(outs, 1)[:, : max(ROWS)], cache


def caller(policy, layer):
    """One compiled call over `width` tokens of two rows, behind `at` others."""

    @functools.partial(jax.jit, static_argnums=3)
    def call(cache, heads, at, width):
        index = at + jnp.arange(width, dtype=jnp.int32)
        start = jnp.full(2, at, jnp.int32)
        step = make_step(tiny_config(), jnp.tile(index, (2, 1)), start=start)
        part = Heads(*(x[:, index] for x in (heads.q, heads.k, heads.v)))
        return policy.attend(cache, part, step, layer)

    return call


def by_hand(heads: Heads, policy: Quest) -> np.ndarray:
    """Token by token: rank the pages before a query's own, attend to the best."""
    positions = jnp.arange(max(ROWS), dtype=jnp.int32)[None]
    tables = angles(positions, SPEC.rope, SPEC.head_dim)
    q, k = (np.asarray(rotate(x, *tables), np.float64) for x in (heads.q, heads.k))
    v, P, out = np.asarray(heads.v), policy.page, np.zeros(heads.q.shape)
    for b, i, h in np.ndindex(len(ROWS), max(ROWS), SPEC.kv_heads):
        if i >= ROWS[b]:
            continue
        own, mine = i // P, slice(2 * h, 2 * h + 2)
        pages = k[b, : own * P, h].reshape(own, 1, P, SPEC.head_dim)
        query = q[b, i, mine][None]
        u = np.maximum(query * pages.max(2), query * pages.min(2)).sum(-1).max(1)
        best = [*np.argsort(-u)[: policy.pages - 1], own]
        seen = [j for j in range(i + 1) if j // P in best]
        s = q[b, i, mine] @ k[b, seen, h].T * SPEC.head_dim**-0.5
        w = np.exp(s - s.max(-1, keepdims=True))
        out[b, i, mine] = w @ v[b, seen, h] / w.sum(-1, keepdims=True)
    return out


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 7, 30])
def test_quest_equals_pages_ranked_by_hand_at_any_chunk(chunk):
    heads = random_heads()
    got, _ = run(SMALL, heads, chunk)
    want = by_hand(heads, SMALL)
    for b, length in enumerate(ROWS):
        np.testing.assert_allclose(got[b, :length], want[b, :length], atol=3e-5)


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_bounds_kept_are_those_of_the_keys_stored(chunk):
    _, cache = run(SMALL, random_heads(), chunk)
    k, bounds = np.asarray(cache.groups[0].k), np.asarray(cache.extra["bounds"])
    for b, length in enumerate(ROWS):
        for page in range(-(-length // 4)):
            keys = k[b, :, 4 * page : min(4 * page + 4, length)]
            np.testing.assert_array_equal(bounds[b, :, page, :8], keys.max(1))
            np.testing.assert_array_equal(bounds[b, :, page, 8:], keys.min(1))


@pytest.mark.parametrize("chunk", [1, 7])
def test_bounds_of_codes_are_those_of_the_decoded_keys_and_over_every_score(chunk):
    heads, policy = random_heads(), dataclasses.replace(SMALL, bits=4)
    _, cache = run(policy, heads, chunk)
    k = np.asarray(cache.groups[0].k.astype(jnp.float32), np.float64)
    bounds = np.asarray(cache.extra["bounds"], np.float64)
    q = np.asarray(heads.q[:, :, ::2], np.float64)  # one query head a kv head
    for b, length in enumerate(ROWS):
        for page in range(-(-length // 4)):
            keys = k[b, :, 4 * page : min(4 * page + 4, length)]
            most, least = np.split(bounds[b, :, page], 2, -1)
            np.testing.assert_array_equal(most, keys.max(1))
            np.testing.assert_array_equal(least, keys.min(1))
            bound = np.maximum(q[b] * most, q[b] * least).sum(-1)
            true = np.einsum("tkh,kch->tkc", q[b], keys).max(-1)
            assert (bound >= true - 1e-9).all()


@pytest.mark.slow
def test_codes_are_read_alike_at_any_chunk_and_near_the_numbers():
    heads, policy = random_heads(), dataclasses.replace(SMALL, bits=8)
    whole = [run(policy, heads, chunk)[0][0] for chunk in (30, 7, 1)]
    np.testing.assert_allclose(whole[1], whole[0], atol=3e-5)
    np.testing.assert_allclose(whole[2], whole[0], atol=3e-5)
    near = np.abs(whole[0] - run(SMALL, heads, 30)[0][0])
    assert 0 < np.median(near) < 0.05


def test_what_was_read_behind_a_copy_leaves_the_copy_as_it_was():
    heads, layer = random_heads(), Layer(0, SPEC)
    other = jax.tree.map(lambda x: -3 * x, heads)
    call = caller(SMALL, layer)
    _, mark = call(SMALL.init(layer, 2, 30, jnp.float32), heads, 0, 14)
    want, _ = call(mark, heads, 14, 14)
    _, strayed = call(mark, other, 14, 14)
    back, _ = call(strayed, heads, 14, 14)
    np.testing.assert_array_equal(want, back)


@pytest.mark.parametrize(
    ("rank", "spec"),
    [
        (0, SPEC),
        (1, dataclasses.replace(SPEC, window=6)),
        (1, dataclasses.replace(SPEC, window=6, sinks=2)),
    ],
    ids=["early", "window", "sinks"],
)
def test_early_layers_and_those_with_a_mask_of_their_own_are_read_whole(rank, spec):
    heads, policy = random_heads(), dataclasses.replace(SMALL, dense=1)
    layer = Layer(0, spec, layer_mask(spec) if spec.static else None, rank, 2)
    got, cache = run(policy.over(layer), heads, 7, layer)
    want, full = run(Full(), heads, 7, layer)
    np.testing.assert_array_equal(got[0], want[0])
    assert measured_bytes(cache) == measured_bytes(full)


@pytest.mark.slow
def test_dense_prefill_reads_all_and_single_tokens_choose():
    heads = random_heads()
    policy = dataclasses.replace(SMALL, prefill="dense")
    whole, cache = run(policy, heads, 30)
    np.testing.assert_array_equal(whole[0], run(Full(), heads, 30)[0][0])
    single, other = run(policy, heads, 1)
    np.testing.assert_array_equal(single[0], run(SMALL, heads, 1)[0][0])
    assert np.abs(single[0] - whole[0]).max() > 1e-2
    np.testing.assert_allclose(
        cache.extra["bounds"][0], other.extra["bounds"][0], atol=1e-6
    )


@pytest.mark.slow
def test_a_budget_approaches_dense_attention():
    heads = random_heads()
    full = run(Full(), heads, 30)[0][0]
    gaps = [
        np.abs(run(dataclasses.replace(SMALL, budget=b), heads, 30)[0][0] - full).mean()
        for b in (12, 20, 28, 32)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-6 < gaps[-2]


@pytest.mark.slow
def test_softcap_scale_and_sink_reach_the_chosen_pages():
    heads, sink = random_heads(), jnp.linspace(-1.0, 1.0, 4)
    spec = dataclasses.replace(SPEC, softcap=1.5, scale=0.7, sink=True)
    index = jnp.tile(jnp.arange(30, dtype=jnp.int32), (2, 1))
    step = make_step(tiny_config(), index, start=jnp.zeros(2, jnp.int32))
    layer, outs = Layer(0, spec), []
    for policy in (Full(), dataclasses.replace(SMALL, budget=28)):
        cache = policy.init(layer, 2, 30, jnp.float32)
        call = jax.jit(policy.attend, static_argnames="layer")
        outs.append(call(cache, heads, step, layer=layer, sink=sink)[0])
    np.testing.assert_allclose(outs[1][:, :28], outs[0][:, :28], atol=2e-5)


def test_a_budget_shows_in_the_losses_of_a_model():
    text, policy = tokens(1, 40), Quest(budget=9, page=1, dense=1)
    got = tiny_lm().nll(text, cache=policy, chunk=40)
    gap = np.abs(got - dense_nll(tiny_lm(), text))
    assert gap[0, :9].max() < 3e-5 < 1e-3 < gap.max()


def test_pages_added_to_a_cache_without_bounds_change_nothing():
    heads, layer = random_heads(), Layer(0, SPEC)
    call = caller(SMALL, layer)
    outs = []
    for slots in (16, 32):
        cache = SMALL.init(layer, 2, slots, jnp.float32)
        _, cache = call(cache, heads, 0, 14)
        kv, bounds = cache.groups[0], cache.extra["bounds"]
        k, v, bounds = (
            jnp.pad(x, ((0, 0), (0, 0), (0, n - x.shape[2]), (0, 0)))
            for x, n in ((kv.k, 32), (kv.v, 32), (bounds, 8))
        )
        pos = jnp.pad(kv.pos, ((0, 0), (0, 0), (0, 32 - slots)), constant_values=-1)
        outs.append(call(Cache((KV(k, v, pos),), {"bounds": bounds}), heads, 14, 14))
    np.testing.assert_array_equal(outs[0][0], outs[1][0])


def test_bounds_take_a_page_th_of_the_cache():
    layer = layers_of(tiny_config())[1]
    full = measured_bytes(Full().init(layer, 3, 64, jnp.float32).groups[0].k)
    quest = Quest(dense=1).init(layer, 3, 64, jnp.float32)
    assert measured_bytes(quest.extra) == 2 * full / 16


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("quest:budget=0", "at least 1"),
        ("quest:page=0", "at least 1"),
        ("quest:budget=1000", "use 992 or 1008"),
        ("quest:budget=1024,page=96", "no whole number"),
        ("quest:dense=-1", "at least 0 layers"),
        ("quest:first=-1", "at least 0 pages"),
        ("quest:budget=64,first=4", "at most 3"),
        ("quest:reduce=sum", "'union'"),
        ("quest:prefill=chunk", "'sparse' or 'dense'"),
        ("quest:pages=4", "did you mean 'page'"),
    ],
)
def test_a_bad_quest_is_one_clear_error(policy, says):
    with pytest.raises(LclmError, match=says):
        policies.make(policy)


def test_quest_refuses_rope_whose_angles_depend_on_the_length():
    lm = tiny_lm(rope=RopeSpec(kind="dynamic", factor=2.0, context=16))
    with pytest.raises(LclmError, match="bounds of keys"):
        lm.cache_bytes("quest:dense=0", 10)


def test_a_small_budget_reads_three_pages():
    assert policies.make("quest:budget=9").pages == 3
