"""The chunked loss against dense cross-entropy: value, gradients, memory, edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.errors import LclmError
from lclm.ops.loss import token_nll, weighted_nll

B, T, D, V = 2, 13, 8, 37


def dense(hidden, table, targets, softcap=None):
    logits = hidden.astype(jnp.float32) @ table.astype(jnp.float32).T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    scores = jax.nn.log_softmax(logits, axis=-1)
    hit = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)
    return jnp.where(targets >= 0, -hit[..., 0], 0.0)


def inputs(dtype=jnp.float32, scale=2.0, shape=(B, T, D, V)):
    b, t, d, v = shape
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = scale * jax.random.normal(keys[0], (b, t, d))
    table = jax.random.normal(keys[1], (v, d))
    targets = jax.random.randint(keys[2], (b, t), 0, v)
    weight = jax.random.normal(keys[3], (b, t))
    return hidden.astype(dtype), table.astype(dtype), targets, weight


@functools.partial(jax.jit, static_argnums=(0, 5))
def value_and_grads(loss, hidden, table, targets, weight, softcap):
    def total(hidden, table):
        nll = loss(hidden, table, targets, softcap=softcap)
        return (weight * nll).sum(), nll

    (_, nll), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, table)
    return nll, *grads


@functools.cache
def chunked(chunk):
    return functools.partial(token_nll, chunk=chunk)


@pytest.mark.parametrize(
    ("chunk", "softcap"), [(4, None), (13, 3.0), (1000, None), (1, 3.0)]
)
def test_value_and_gradients_equal_dense_at_any_chunk(chunk, softcap):
    args = inputs()
    got = value_and_grads(chunked(chunk), *args, softcap)
    want = value_and_grads(dense, *args, softcap)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == jnp.float32 and g.shape == w.shape
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_within_two_hundredths_of_float32():
    args = inputs(jnp.bfloat16)
    got = value_and_grads(chunked(4), *args, None)
    want = value_and_grads(
        dense, *[a.astype(jnp.float32) for a in args[:2]], *args[2:], None
    )
    assert [g.dtype for g in got] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    for g, w in zip(got, want, strict=True):
        error = jnp.linalg.norm(g.astype(jnp.float32) - w) / jnp.linalg.norm(w)
        assert error < 2e-2


def test_the_table_gradient_is_summed_in_float32():
    hidden = jnp.ones((1, 4096, 1), jnp.bfloat16)
    table, targets = jnp.zeros((2, 1), jnp.bfloat16), jnp.zeros((1, 4096), jnp.int32)
    loss = lambda w: token_nll(hidden, w, targets, chunk=1).sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(loss)(table), [[-2048], [2048]])


def test_negative_targets_cost_nothing_and_pull_nothing():
    hidden, table, targets, weight = inputs()
    targets = targets.at[0].set(-100)
    nll, into_hidden, into_table = value_and_grads(
        chunked(4), hidden, table, targets, weight, None
    )
    assert (nll[0] == 0).all() and (nll[1] > 0).all()
    assert (into_hidden[0] == 0).all()
    alone = value_and_grads(
        chunked(4), hidden[1:], table, targets[1:], weight[1:], None
    )
    np.testing.assert_allclose(into_table, alone[2], rtol=1e-5, atol=1e-6)


def test_a_target_past_the_vocabulary_is_nan_not_a_number():
    hidden, table, targets, _ = inputs()
    nll = token_nll(hidden, table, targets.at[1, 2].set(V), chunk=4)
    assert jnp.isnan(nll[1, 2]) and jnp.isnan(nll).sum() == 1


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_of_ten_thousand_stay_finite(softcap):
    args = inputs(scale=5e3)
    got = value_and_grads(chunked(4), *args, softcap)
    assert all(jnp.isfinite(g).all() for g in got)
    want = value_and_grads(dense, *args, softcap)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temporaries_stay_below_the_full_logits(dtype):
    shape, chunk = (2, 1024, 16, 4096), 64
    args = inputs(dtype, shape=shape)
    full = 2 * 1024 * 4096 * 4
    temp = {}
    for name, loss in (("chunked", chunked(chunk)), ("dense", dense)):
        compiled = value_and_grads.lower(loss, *args, None).compile()
        temp[name] = compiled.memory_analysis().temp_size_in_bytes
    assert temp["dense"] >= full
    tile, copies = chunk * 4096 * 4, sum(a.nbytes for a in args[:2])
    assert temp["chunked"] < 4 * tile + 4 * copies < full / 4, temp


@pytest.mark.parametrize(
    ("options", "word"),
    [({"chunk": 0}, "chunk is 0"), ({"softcap": 0.0}, "softcap is 0.0")],
)
def test_a_chunk_below_one_and_a_cap_of_zero_are_errors(options, word):
    with pytest.raises(LclmError, match=word):
        token_nll(*inputs()[:3], **options)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_weighted_sum_and_its_gradients_are_those_of_the_token_losses(softcap):
    rng = np.random.default_rng(5)
    hidden = jnp.asarray(rng.standard_normal((2, 7, 6)), jnp.float32)
    table = jnp.asarray(rng.standard_normal((11, 6)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (2, 7)))
    weights = jnp.asarray(rng.integers(0, 3, (2, 7)), jnp.float32) / 2

    def plain(hidden, table):
        counted = jnp.where(weights > 0, targets, -1)
        nll = token_nll(hidden, table, counted, chunk=14, softcap=softcap)
        return 0.3 * jnp.sum(nll * weights)

    def fused(hidden, table):
        options = dict(chunk=4, softcap=softcap)
        return 0.3 * weighted_nll(hidden, table, targets, weights, **options)

    want, slopes = jax.value_and_grad(plain, (0, 1))(hidden, table)
    got, found = jax.value_and_grad(fused, (0, 1))(hidden, table)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(fused(hidden, table), want, rtol=1e-6)
    for a, b in zip(found, slopes, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_a_frozen_table_costs_no_gradient_of_its_own():
    hidden = jnp.ones((1, 64, 8))
    table = jnp.ones((512, 8))
    targets, weights = jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64))

    def loss(hidden, table):
        return weighted_nll(hidden, table, targets, weights, chunk=16)

    def products(argnums):
        made = jax.make_jaxpr(jax.grad(loss, argnums))(hidden, table)
        return str(made).count("dot_general[")

    assert products(0) == 2 and products((0, 1)) == 3
