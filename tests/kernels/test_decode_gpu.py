"""Laws of the GPU's decode kernel that need no GPU: values, choice."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention.gpu import interpreted
from pallas_kernels.decode import (
    attention_and_sums,
    cached_attention,
    paged_attention,
)
from tests.kernels import caches
from tests.kernels.caches import B, K, case, coded, paged

N, H = 4, 64


@pytest.fixture(autouse=True)
def few_programs():
    with tuning.using("decode_gpu", programs=8, least=2):
        yield


def wide(**options):
    """A case of the width and the type that the kernel takes."""
    return case(**dict(N=N, C=296, H=H, dtype=jnp.bfloat16) | options)


def same(call, *args, **options):
    return caches.same(
        call, *args, name="mosaic_gpu", under=interpreted(), tolerance=2e-2, **options
    )


@pytest.mark.slow  # the simulator takes seconds a case
@pytest.mark.parametrize("C", [64, 296, 512])
def test_any_order_of_slots_and_any_fill_give_xlas_values(C):
    args, fill = wide(T=2, C=C, per_head=True)
    same(cached_attention, *args)
    sink = jnp.linspace(-1, 1, N)
    same(cached_attention, *args, length=fill, window=40, softcap=2.0, sink=sink)


@pytest.mark.slow
def test_rows_that_see_nothing_give_nothing_and_sums_are_xlas():
    args, _ = wide()
    k_pos = args[4].at[0].set(-1)
    beside = jnp.zeros((B, N, 1), jnp.float32)
    for length in (None, 0):
        places = k_pos if length is None else jnp.full_like(k_pos, -1)
        out, lse, sums = same(
            attention_and_sums, *args[:4], places, beside, length=length
        )
        assert not out[0].any() and np.isneginf(lse[0]).all() and not sums[0].any()


@pytest.mark.slow
@pytest.mark.parametrize("page", [16, 64])
def test_the_chosen_pages_give_xlas_values(page):
    args, length = paged(page, 3, N=N, H=H, dtype=jnp.bfloat16)
    same(paged_attention, *args, length=length)


def test_a_gpu_runs_the_kernel_unless_told_otherwise():
    args, _ = wide()
    kernel = "wgmma", "gpu", cached_attention
    assert caches.has(*kernel, *args)
    assert not caches.has(*kernel, *args, implementation="xla")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda q, k, v: (q, k.astype(jnp.float32), v), "float32, bfloat16"),
        (lambda q, k, v: (q, *coded(k, v)), "codes"),
        (lambda q, k, v: (jnp.repeat(q, 40, 1), k, v), "80 queries"),
        (lambda q, k, v: (q, k[:, :, :60], v[:, :, :60]), "60 slots"),
        (lambda q, k, v: (q, k[:, :, :67], v[:, :, :67]), "67 slots"),
        (lambda q, k, v: tuple(x[..., :32] for x in (q, k, v)), r"\(32, 32\)"),
    ],
)
def test_what_the_kernel_cannot_take_it_refuses_by_name(change, told):
    q, k, v = change(*wide()[0][:3])
    q_pos = jnp.zeros(q.shape[:2], jnp.int32)
    k_pos = jnp.zeros((B, K, k.shape[2]), jnp.int32)
    with dispatch.target("gpu"), pytest.raises(ValueError, match=told):
        cached_attention(q, k, v, q_pos, k_pos, implementation="mosaic_gpu")
