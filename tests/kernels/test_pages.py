"""Laws of choosing pages by their bounds, against an oracle in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode import (
    Selection,
    cached_attention,
    page_bounds,
    paged_attention,
    refresh_bounds,
    select_pages,
    upper_bounds,
)

B, N, K, C, H, P = 2, 4, 2, 48, 8, 4
LENGTH = np.array([45, 18])  # rows end inside a page


attend = jax.jit(paged_attention, static_argnames=("choice", "scale", "softcap"))
bounds_of = jax.jit(page_bounds, static_argnames="page")
refresh = jax.jit(refresh_bounds, static_argnames="page")
select = jax.jit(select_pages, static_argnames="choice")
dense = jax.jit(cached_attention)


def case(T=1, seed=0, dtype=jnp.float32):
    """Queries at the ends of ragged rows; slots behind a row's end hold NaN."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=s) for s in ((B, T, N, H), (B, K, C, H), (B, K, C, H)))
    for b, length in enumerate(LENGTH):
        k[b, :, length:] = 1e4
        v[b, :, length:] = 1e4
    q_pos = LENGTH[:, None] - T + np.arange(T)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    bounds = bounds_of(k, jnp.asarray(LENGTH), P)
    return q, k, v, bounds, jnp.asarray(q_pos, jnp.int32)


def chosen_by_oracle(q, k, q_pos, choice, b, t, h):
    """The set of pages of one query and kv head, by sorting."""
    own, group = int(q_pos[b, t]) // P, N // K
    keys = np.asarray(k, np.float64)[b, h]
    pages = keys[: own * P].reshape(own, P, H)
    u = np.zeros((group, own))
    for g in range(group):
        query = np.asarray(q, np.float64)[b, t, h * group + g]
        u[g] = np.maximum(query * pages.max(1), query * pages.min(1)).sum(-1)

    def best(scores):
        forced = list(range(min(choice.first, own)))
        others = [p for p in np.argsort(-scores, kind="stable") if p not in forced]
        return {own, *forced, *others[: choice.count - 1 - len(forced)]}

    if choice.reduce == "union":
        return set().union(*(best(scores) for scores in u))
    return best(u.max(0) if choice.reduce == "max" else u.mean(0))


def oracle(q, k, v, q_pos, choice, scale=H**-0.5, softcap=None, sink=None):
    """Softmax attention of each query over its own pages alone."""
    T = q.shape[1]
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        h = n // (N // K)
        if q_pos[b, t] < 0:
            continue
        pages = chosen_by_oracle(q, k, q_pos, choice, b, t, h)
        seen = [c for c in range(int(q_pos[b, t]) + 1) if c // P in pages]
        s = np.asarray(k, np.float64)[b, h, seen] @ np.asarray(q[b, t, n]) * scale
        s = s if softcap is None else softcap * np.tanh(s / softcap)
        w = np.exp(s)
        total = w.sum() + (0 if sink is None else np.exp(sink[n]))
        out[b, t, n] = w @ np.asarray(v, np.float64)[b, h, seen] / total
    return out


CHOICES = (
    Selection(P, 3),
    Selection(P, 4, first=2),
    Selection(P, 3, reduce="mean"),
    Selection(P, 3, first=1, reduce="union"),
)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("T", [1, 14])
def test_each_query_attends_to_its_own_pages_alone(T, choice):
    case_ = case(T)
    q, k, v, _, q_pos = case_
    out, _ = attend(*case_, choice)
    np.testing.assert_allclose(out, oracle(q, k, v, q_pos, choice), atol=2e-5)


@pytest.mark.parametrize("T", [1, 14])
def test_scale_softcap_and_sink_equal_the_oracle(T):
    case_ = case(T)
    q, k, v, _, q_pos = case_
    options = {"scale": 0.7, "softcap": 1.5}
    sink = jnp.linspace(-1, 1, N)
    out, _ = attend(*case_, CHOICES[0], sink=sink, **options)
    want = oracle(q, k, v, q_pos, CHOICES[0], sink=sink, **options)
    np.testing.assert_allclose(out, want, atol=2e-5)


def test_a_call_of_many_queries_equals_one_call_each():
    q, k, v, bounds, q_pos = case(14)
    many, lse = attend(q, k, v, bounds, q_pos, CHOICES[0], length=45)
    for t in range(14):
        out, each = attend(q[:, [t]], k, v, bounds, q_pos[:, [t]], CHOICES[0])
        np.testing.assert_allclose(many[:, t : t + 1], out, atol=2e-5)
        np.testing.assert_allclose(lse[..., t : t + 1], each, atol=2e-5)


@pytest.mark.parametrize("T", [1, 14])
@pytest.mark.parametrize("choice", [Selection(P, C // P), Selection(C, 1)], ids=str)
def test_all_pages_or_one_that_holds_all_equal_dense_attention(T, choice):
    q, k, v, _, q_pos = case(T)
    bounds = bounds_of(k, jnp.asarray(LENGTH), choice.page)
    places = jnp.arange(C)[None, None] + jnp.zeros((B, 1, 1), jnp.int32)
    want, lse = dense(q, k, v, q_pos, places)
    got = attend(q, k, v, bounds, q_pos, choice)
    np.testing.assert_allclose(got[0], want, atol=1e-6)
    np.testing.assert_allclose(got[1], lse, atol=1e-6)


def test_as_many_pages_as_a_row_has_equal_dense_attention():
    q, k, v, bounds, q_pos = case()
    choice = Selection(P, 11)
    some = LENGTH // P + 1 <= choice.count
    places = jnp.arange(C)[None, None] + jnp.zeros((B, 1, 1), jnp.int32)
    want, _ = dense(q, k, v, q_pos, places)
    got, _ = attend(q, k, v, bounds, q_pos, choice)
    np.testing.assert_allclose(got[some], want[some], atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_bound_of_a_page_is_no_less_than_any_of_its_products(dtype):
    q, k, _, bounds, _ = case(14, dtype=dtype)
    u = np.asarray(upper_bounds(q, bounds))
    for b, h in np.ndindex(B, K):
        whole = LENGTH[b] // P
        keys = np.asarray(k, np.float64)[b, h, : whole * P]
        queries = np.asarray(q, np.float64).reshape(B, 14, K, N // K, H)[b, :, h]
        products = (queries @ keys.T).reshape(14, N // K, whole, P).max(-1)
        mine = u[b, :, h, :, :whole]
        assert (mine >= products - 1e-4).all()
        assert (mine.max(1) >= products.max(1) - 1e-4).all()
        assert (mine < products + 40).all()


def test_bounds_kept_up_by_calls_of_any_width_equal_those_taken_at_once():
    rng = np.random.default_rng(1)
    k = jnp.asarray(rng.normal(size=(B, K, C, H)), jnp.float32)
    length = np.zeros(B, np.int32)
    bounds = bounds_of(jnp.zeros_like(k), jnp.asarray(length), P)
    steps = [(5, [5, 2]), (1, [1, 0]), (7, [3, 7]), (1, [1, 1]), (30, [30, 9])]
    for width, count in steps:
        start = jnp.asarray(length)
        length = length + np.array(count, np.int32)
        index = jnp.minimum(start[:, None] + jnp.arange(width), C - 1)
        new = jnp.take_along_axis(k, index[:, None, :, None], 2)
        held = jnp.where(
            jnp.arange(C)[None, :, None] < start[:, None, None, None], k, 7
        )
        bounds = refresh(bounds, held, new, start, jnp.asarray(length), page=P)
        np.testing.assert_array_equal(bounds, bounds_of(k, jnp.asarray(length), P))


def test_bounds_after_taking_tokens_back_are_those_of_what_is_left():
    _, k, _, bounds, _ = case()
    back = jnp.asarray(LENGTH - 6)
    other = k.at[0, :, 39].multiply(0.5).at[1, :, 12].multiply(0.5)
    new = jnp.take_along_axis(other, back[:, None, None, None], 2)
    got = refresh(bounds, k, new, back, back + 1, page=P)
    want = bounds_of(other, back + 1, P)
    for b in range(B):
        held = (LENGTH[b] - 6) // P + 1
        np.testing.assert_array_equal(got[b, :, :held], want[b, :, :held])


@pytest.mark.parametrize("T", [1, 14])
@pytest.mark.parametrize("reduce", ["max", "union"])
def test_a_page_with_a_planted_key_is_always_chosen(T, reduce):
    q, k, _, _, q_pos = case(T)
    for h in range(K):
        k = k.at[0, h, 9].set(50 * q[0, -1, 2 * h])
    bounds = bounds_of(k, jnp.asarray(LENGTH), P)
    pages = select(q, bounds, q_pos, Selection(P, 2, reduce=reduce))
    for h in range(K):
        assert 9 // P in pages[0, -1, h]


def test_pages_are_whole_unlike_and_none_lies_ahead():
    q, _, _, bounds, q_pos = case(14)
    for choice in CHOICES:
        pages = np.asarray(select(q, bounds, q_pos, choice))
        for b, t, h in np.ndindex(B, 14, K):
            found = [p for p in pages[b, t, h].tolist() if p >= 0]
            own = int(q_pos[b, t]) // P
            assert len(found) == len(set(found)) and own in found
            assert max(found) == own
            assert set(range(min(choice.first, own + 1))) <= set(found)


def test_empty_slots_and_pages_leave_no_trace():
    q, k, v, _, q_pos = case()
    clean = [x.at[1, :, LENGTH[1] :].set(0.0) for x in (k, v)]
    outs = []
    for keys, values in ((k, v), clean):
        bounds = bounds_of(keys, jnp.asarray(LENGTH), P)
        held = -(-LENGTH[1] // P)
        outs.append((bounds[1, :, :held], *attend(
            q, keys, values, bounds, q_pos, CHOICES[0]
        )))  # fmt: skip
    for a, b in zip(*outs, strict=True):
        np.testing.assert_array_equal(a, b)
    empty = bounds_of(k, jnp.zeros(B, jnp.int32), P)
    assert (np.asarray(upper_bounds(q, empty)) < -1e30).all()


@pytest.mark.parametrize("choice", [CHOICES[0], Selection(P, C // P)], ids=str)
@pytest.mark.parametrize("T", [1, 14])
def test_slots_from_the_length_on_are_not_seen(T, choice):
    q, k, v, bounds, q_pos = case(T)
    length = jnp.asarray(LENGTH - 1)
    out, lse = attend(q, k, v, bounds, q_pos, choice, length=length)
    changed = [x.at[0, :, 44].set(-5.0).at[1, :, 17].set(9.0) for x in (k, v)]
    again = attend(q, *changed, bounds, q_pos, choice, length=length)
    np.testing.assert_array_equal(out, again[0])
    np.testing.assert_array_equal(lse, again[1])


def test_padding_attends_to_nothing():
    q, k, v, bounds, q_pos = case(14)
    q_pos = q_pos.at[1].set(-1)
    for part in (slice(0, 14), slice(0, 1)):
        out, lse = attend(q[:, part], k, v, bounds, q_pos[:, part], CHOICES[1])
        assert (np.asarray(out[1]) == 0).all() and np.isneginf(lse[1]).all()


def test_one_query_copies_only_its_pages():
    shape = (1, 3, 8192, 64)
    k = jnp.zeros(shape)
    bounds = bounds_of(k, jnp.full(1, 8192), 16)
    q, q_pos = jnp.zeros((1, 1, 9, 64)), jnp.full((1, 1), 8191)
    run = jax.jit(functools.partial(paged_attention, choice=Selection(16, 8)))
    memory = run.lower(q, k, k, bounds, q_pos).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend tells no memory")
    assert memory.temp_size_in_bytes < k.nbytes / 8


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Selection(0, 3), "page=0"),
        (lambda: Selection(4, 2, first=2), "first=2"),
        (lambda: Selection(4, 2, first=-1), "first=-1"),
        (lambda: Selection(4, 2, reduce="sum"), "reduce='sum'"),
        (lambda: paged_attention(*case(), Selection(5, 3)), "round it up to 50"),
        (lambda: paged_attention(*case(), Selection(8, 3)), "bounds"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(make, says):
    with pytest.raises(ValueError, match=says):
        make()
