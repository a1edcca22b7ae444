"""Laws of drawing a token; the oracle is the papers' filters by full sorts in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.errors import LclmError
from lclm.ops.sampling import Sampler, keep, sample

draw = jax.jit(sample, static_argnums=2)
filtered = jax.jit(keep, static_argnums=1)

SAMPLERS = [
    Sampler(1.0),
    Sampler(0.7),
    Sampler(1.3, top_k=5),
    Sampler(1.0, top_k=1),
    Sampler(1.0, top_k=10_000),
    Sampler(0.9, top_p=0.6),
    Sampler(0.9, top_p=1e-6),
    Sampler(1.0, top_p=1.0),
    Sampler(1.0, min_p=0.1),
    Sampler(1.0, min_p=1.0),
    Sampler(0.8, top_k=20, top_p=0.8),
    Sampler(1.5, top_k=30, top_p=0.9, min_p=0.05),
    Sampler(2.0, top_p=0.9, min_p=0.2),
]


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def oracle(logits, sampler):
    """Probabilities of one row, each filter by a full stable sort in float64."""
    x = logits.astype(np.float64) / sampler.temperature
    if sampler.top_k is not None:
        x[x < np.sort(x)[::-1][min(sampler.top_k, x.size) - 1]] = -np.inf
    if sampler.top_p is not None and sampler.top_p < 1:
        order = np.argsort(-x, kind="stable")
        p = softmax(x)[order]
        x[order[(p.cumsum() - p >= sampler.top_p) & (np.arange(x.size) > 0)]] = -np.inf
    p = softmax(x)
    if sampler.min_p is not None:
        p[p < sampler.min_p * p.max() * (1 - 1e-9)] = 0
    return p / p.sum()


@functools.cache
def rows(vocab):
    logits = 2 * np.random.default_rng(vocab).standard_normal((3, vocab))
    logits = logits.astype(np.float32)
    logits[1, 3:7] = -np.inf
    logits[2] += 1e4
    return logits


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_filters_leave_the_oracles_distribution(sampler):
    logits = rows(600)
    got = jax.nn.softmax(filtered(logits, sampler), axis=-1)
    for row, probabilities in zip(logits, np.asarray(got), strict=True):
        want = oracle(row, sampler)
        np.testing.assert_array_equal(probabilities > 0, want > 0)
        np.testing.assert_allclose(probabilities, want, atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize(
    ("vocab", "sampler"),
    [(40, SAMPLERS[0]), (600, SAMPLERS[1]), (600, SAMPLERS[5]), (600, SAMPLERS[-2])],
    ids=str,
)
def test_draws_follow_the_oracles_distribution(vocab, sampler):
    logits, count = rows(vocab)[0], 4000
    tokens = draw(jnp.tile(logits, (count, 1)), jax.random.key(7), sampler)
    assert tokens.dtype == jnp.int32
    want = oracle(logits, sampler)
    seen = np.bincount(tokens, minlength=vocab)
    assert seen.size == vocab and (seen[want == 0] == 0).all()
    likely = want * count >= 5
    spread = (seen - want * count) ** 2 / np.maximum(want * count, 1e-9)
    chi, freedom = spread[likely].sum(), max(likely.sum() - 1, 1)
    assert chi < freedom + 4.5 * np.sqrt(2 * freedom), (chi, freedom)


def test_the_two_halves_of_a_draw_are_independent():
    tokens = np.asarray(
        draw(jnp.zeros((32, 256 * 256)), jax.random.key(8), Sampler(1.0))
    )
    row, column = tokens // 256, tokens % 256
    assert (row == column).sum() <= 2 and len(set(row)) > 20 and len(set(column)) > 20


def test_ties_with_the_last_kept_token_stay_together():
    logits = np.float32([[3, 1, 2, 2, 2, 0]])
    for sampler in (Sampler(1.0, top_k=2), Sampler(1.0, top_p=0.6)):
        kept = np.isfinite(filtered(logits, sampler)[0])
        np.testing.assert_array_equal(kept, [True, False, True, True, True, False])
    both = filtered(logits, Sampler(1.0, top_k=2, top_p=0.5))
    assert np.isfinite(both).sum() == 4  # half lies past the first: 0.4754


def test_zero_temperature_is_argmax_whatever_the_key_and_filters():
    logits = rows(600)
    for seed in (0, 1):
        key = jax.random.key(seed)
        tokens = draw(logits, key, Sampler(0.0, top_k=2, top_p=0.5))
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert "random" not in str(
        jax.make_jaxpr(sample, static_argnums=2)(logits, jax.random.key(0), Sampler())
    )


def test_cold_draws_are_the_argmax():
    tokens = draw(rows(600), jax.random.key(3), Sampler(1e-6))
    np.testing.assert_array_equal(tokens, rows(600).argmax(-1))


@pytest.mark.parametrize("sampler", [Sampler(1.0), Sampler(2.0, top_k=30, top_p=0.9)])
def test_a_rows_draw_ignores_the_other_rows(sampler):
    logits = jnp.tile(rows(600)[0], (64, 1))
    key = jax.random.key(5)
    tokens = draw(logits, key, sampler)
    others = draw(logits.at[1:].set(-logits[1:]), key, sampler)
    assert tokens[0] == others[0] and (tokens[1:] != others[1:]).any()
    np.testing.assert_array_equal(draw(logits[:7], key, sampler), tokens[:7])
    assert len(set(tokens.tolist())) > 5


def test_keys_per_row_fix_the_draw_wherever_the_row_is():
    keys = jax.random.split(jax.random.key(6), 3)
    tokens = draw(rows(600), keys, Sampler(3.0))
    swapped = draw(rows(600)[::-1], keys[::-1], Sampler(3.0))
    np.testing.assert_array_equal(tokens, swapped[::-1])


def test_temperature_alone_neither_sorts_nor_ranks():
    text = str(
        jax.make_jaxpr(sample, static_argnums=2)(
            jnp.zeros((2, 600)), jax.random.key(0), Sampler(1.0)
        )
    )
    assert "top_k" not in text and "sort[" not in text
    text = jax.make_jaxpr(keep, static_argnums=1)(
        jnp.zeros((2, 600)), Sampler(1.0, top_p=0.5)
    )
    assert "sort[" not in str(text)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-9),
        ("temperature", True),
        ("top_k", 0),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.5),
    ],
)
def test_an_option_out_of_range_is_an_error_naming_it(option, value):
    with pytest.raises(LclmError, match=f"{option} is {value!r}; use"):
        Sampler(**{option: value})
