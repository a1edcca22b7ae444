"""Laws of the TPU's decode kernels that need no TPU: values, what is read, choice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lclm.ops import codes
from pallas_kernels import dispatch, tuning
from pallas_kernels.attention.tpu import interpreted
from pallas_kernels.decode import (
    Selection,
    attention_and_sums,
    cached,
    cached_attention,
    paged_attention,
    pages,
    select_pages,
    select_tpu,
    tpu,
)
from tests.kernels import caches
from tests.kernels.caches import B, K, case, coded, paged

N = 4
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "RUN", 32)
    with tuning.using("decode_tpu", block=256):
        yield


def same(call, *args, how=True, **options):
    return caches.same(
        call, *args, name="mosaic_tpu", under=interpreted(how), **options
    )


def test_outputs_and_the_column_sums_of_a_merged_softmax_are_xlas():
    args, fill = case(T=2, per_head=True)
    (beside,) = caches.draw(0, jnp.float32, (B, N, 2))
    beside = beside.at[0, 0].set(-jnp.inf)
    options = {"length": fill, "window": 120, "softcap": 2.0}
    _, lse, sums = same(attention_and_sums, *args, beside, **options)
    seen = np.isfinite(lse)
    share = seen / (1 + np.exp(np.where(seen, beside - np.where(seen, lse, 0), 0)))
    np.testing.assert_allclose(sums.sum((1, 2)), share.sum((1, 2)), rtol=1e-5)


def test_listed_pages_give_xlas_values():
    q, k, v = caches.draw(2, jnp.float32, (1, 1, N, 16), (1, K, 96, 16), (1, K, 96, 16))
    index = jnp.asarray([[[4, 0, 5], [2, -1, -1]]])
    places = pages._places(index, 16)
    scoring = cached._scoring(q, k, jnp.asarray([[90]]), None, None, None)
    want = pages.attend_pages(scoring, q, k, v, index, places)
    with interpreted():
        got = tpu.attend_pages(scoring, q, k, v, index, places)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.slow
def test_the_largest_of_many_scores_are_those_of_sorting(monkeypatch):
    monkeypatch.setattr(select_tpu, "WIDE", 256)
    (score,) = caches.draw(3, jnp.float32, (2, 5, 300))
    score = jnp.round(4 * score) / 4  # many are equal
    score = score.at[0, 0, 130:].set(-jnp.inf).at[1, 1, 7].set(jnp.inf)
    with interpreted():
        got = np.asarray(select_tpu.best(score, 140))
    want = np.asarray(pages._best(score, 140))
    ordered = np.where(want < 0, 300, want)
    np.testing.assert_array_equal(np.where(got < 0, 300, got), np.sort(ordered))


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["max", "union"])
def test_the_chosen_pages_give_xlas_values(reduce):
    (*args, choice), length = paged()
    choice = dataclasses.replace(choice, reduce=reduce)
    same(paged_attention, *args, choice, length=length, sink=jnp.linspace(-1, 1, N))


@pytest.mark.slow
def test_pages_that_are_not_chosen_are_not_read():
    (q, k, v, bounds, q_pos, choice), _ = paged(count=2)
    q_pos = jnp.full_like(q_pos, 470)
    rest = bounds, q_pos, choice
    out, _ = same(paged_attention, q, k, v, *rest)
    index = np.asarray(select_pages(q, *rest)[:, 0])
    for b, h in np.ndindex(B, K):
        others = np.ones(k.shape[2], bool)
        for page in index[b, h]:
            others[page * 16 : (page + 1) * 16] = False
        k, v = (x.at[b, h, others].set(jnp.nan) for x in (k, v))
    again, _ = same(paged_attention, q, k, v, *rest)
    np.testing.assert_array_equal(out, again)


@pytest.mark.slow
def test_codes_are_read_as_the_numbers_they_stand_for():
    (q, k, v, *pos), fill = case()
    same(cached_attention, q, *coded(k, v), *pos)
    same(cached_attention, q, *coded(k, v, group=32), *pos, length=fill)
    args, length = paged(page=32, count=3, group=16)
    same(paged_attention, *args, length=length)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("C", [3, 256, 1030])
def test_every_size_gives_xlas_values(T, C):
    args, fill = case(T=T, C=C)
    sink = jnp.linspace(-1, 1, N)
    same(cached_attention, *args, sink=sink)
    same(cached_attention, *args, length=fill, window=jnp.int32(50))
    beside = jnp.zeros((B, N, T), jnp.float32)
    same(attention_and_sums, *args, beside, length=jnp.max(fill), softcap=1.5)


@pytest.mark.slow
def test_large_groups_give_xlas_values():
    args, fill = case(T=7, C=2100, N=10, H=16)
    beside = jnp.zeros((B, 10, 7), jnp.float32)
    with tuning.using("decode_tpu", block=2048):
        same(attention_and_sums, *args, beside, length=fill)


@pytest.mark.slow
@pytest.mark.parametrize("length", [None, 0, 200])
def test_rows_that_see_nothing_give_nothing(length):
    args, _ = case()
    k_pos = args[4].at[0].set(-1)
    if length is not None:
        k_pos = k_pos.at[..., length:].set(-1)
    beside = jnp.zeros((B, N, 1), jnp.float32)
    out, lse, sums = same(attention_and_sums, *args[:4], k_pos, beside, length=length)
    assert not out[0].any() and np.isneginf(lse[0]).all() and not sums[0].any()


@pytest.mark.slow
def test_slots_behind_the_length_are_not_read():
    args, _ = case(C=600)
    k_pos = args[4].at[..., 256:].set(-1)
    k, v = (x.at[:, :, 256:].set(jnp.nan) for x in args[1:3])
    same(cached_attention, args[0], k, v, args[3], k_pos, length=200)


@pytest.mark.slow
def test_a_bfloat16_cache_gives_xlas_values():
    args, fill = case(dtype=jnp.bfloat16)
    same(cached_attention, *args, length=fill, tolerance=2e-2)
    q, k, v, *pos = args
    same(cached_attention, q, *coded(k, v), *pos, length=fill, tolerance=2e-2)
    args, length = paged(dtype=jnp.bfloat16)
    same(paged_attention, *args, length=length, tolerance=2e-2)


@pytest.mark.slow
def test_no_memory_is_read_before_it_is_written():
    args, fill = case()
    beside = jnp.zeros((B, N, 1), jnp.float32)
    same(attention_and_sums, *args, beside, how=RACES, length=jnp.max(fill))
    args, length = paged()
    same(paged_attention, *args, how=RACES, length=length)


def test_a_tpu_runs_the_kernel_unless_told_otherwise():
    args, _ = case()
    kernel = "pallas_call", "tpu", cached_attention
    assert caches.has(*kernel, *args)
    assert not caches.has(*kernel, *args, implementation="xla")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"q": jnp.zeros((B, 65, N, 32))}, "130 queries times heads"),
        ({"k": jnp.zeros((B, K, 300, 32), jnp.float16)}, "dtype float16"),
        ({"k": codes.zeros((B, K, 300, 32), 4, (1, 16), jnp.float32)}, "4 bits"),
        ({"k": codes.zeros((B, K, 300, 32), 8, (20, 1), jnp.float32)}, r"\(20, 1\)"),
    ],
)
def test_what_the_kernel_cannot_take_it_refuses_by_name(change, told):
    (q, k, v, q_pos, k_pos), _ = case()
    call = {"q": q, "k": k, "v": v} | change
    q_pos = jnp.zeros(call["q"].shape[:2], jnp.int32)
    with dispatch.target("tpu"), pytest.raises(ValueError, match=told):
        cached_attention(*call.values(), q_pos, k_pos, implementation="mosaic_tpu")


@pytest.mark.parametrize(
    ("platform", "name", "told"),
    [
        ("tpu", "mosaic_tpu", "pages of 8"),
        ("cpu", "mosaic_tpu", "this is cpu"),
        ("cpu", "cuda", "this build has"),
    ],
)
def test_pages_are_refused_by_name_and_with_the_reason(platform, name, told):
    args, _ = paged(page=8, dtype=jnp.bfloat16)
    with dispatch.target(platform), pytest.raises(ValueError, match=told):
        jax.eval_shape(
            lambda *args: paged_attention(*args, Selection(8, 6), implementation=name),
            *args[:-1],
        )
