"""Caches to attend to, and how a kernel's values are held against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np

from lclm.ops import codes
from pallas_kernels import dispatch
from pallas_kernels.decode import Selection, page_bounds

B, K = 2, 2


def draw(seed: int, dtype, *shapes):
    """Normal numbers."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def case(T=1, C=300, *, N=4, H=32, dtype=jnp.float32, per_head=False):
    """Slots in any order, rows filled in part, a query of padding where there are more.

    The arguments of `cached_attention`, and the slots that rows have.
    """
    rng = np.random.default_rng(T + C)
    arrays = draw(T + C, dtype, (B, T, N, H), (B, K, C, H), (B, K, C, H))
    fill = [C - C // 40, C // 3]
    k_pos = np.full((B, K if per_head else 1, C), -1)
    for b, h in np.ndindex(k_pos.shape[:2]):
        k_pos[b, h, : fill[b]] = rng.permutation(fill[b])
    q_pos = np.asarray(fill)[:, None] - T + 1 + np.arange(T)
    q_pos[1, 1:] = -1
    places = [jnp.asarray(x, jnp.int32) for x in (q_pos, k_pos)]
    return (*arrays, *places), jnp.asarray(fill)


def coded(*arrays, group=16):
    """Codes of 8 bits, a scale for each slot and `group` channels."""
    return [codes.encode(x, 8, (1, group)) for x in arrays]


def paged(page=16, count=6, *, N=4, H=32, dtype=jnp.float32, group=None):
    """The arguments of `paged_attention` for rows of 470 and 40 tokens, and these."""
    C, length = 512, jnp.asarray([470, 40], jnp.int32)
    q, k, v = draw(1, dtype, (B, 1, N, H), (B, K, C, H), (B, K, C, H))
    bounds = page_bounds(k, length, page)
    if group:
        k, v = coded(k, v, group=group)
    choice = Selection(page, count, first=1)
    return (q, k, v, bounds, length[:, None], choice), length


def same(call, *args, name, under, tolerance=3e-6, **options):
    """Assert that a kernel, interpreted `under` a context, and XLA's form agree."""
    want = call(*args, implementation="xla", **options)
    with dispatch.target(name.removeprefix("mosaic_")), under:
        got = call(*args, implementation=name, **options)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.array_equal(np.isneginf(a), np.isneginf(b))
        a, b = (np.where(np.isneginf(x), 0, x) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)
    return got


def has(primitive: str, platform: str, call, *args, **options) -> bool:
    """Whether a call traced for a platform has a kernel's primitive in it."""
    with dispatch.target(platform):
        traced = jax.make_jaxpr(lambda *args: call(*args, **options))(*args)
    return primitive in str(traced)
