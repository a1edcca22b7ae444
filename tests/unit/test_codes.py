"""Laws of cached numbers as codes, and of attention that reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.cache.base import empty, measured_bytes
from lclm.errors import LclmError
from lclm.ops import codes
from pallas_kernels.decode import cached_attention, column_sums

encode = jax.jit(codes.encode, static_argnums=(1, 2))
GROUPS = [(1, 32), (32, 1)]


def numbers(shape=(2, 3, 64, 64), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def half_scale(coded):
    t, h = coded.group
    scale = np.asarray(coded.scale, np.float32)
    return np.repeat(np.repeat(scale, t, -2), h, -1) / 2


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", codes.BITS)
def test_a_code_is_within_half_its_stored_scale(bits, group):
    for factor, offset in [(1, 0), (1e-6, 0), (1e-3, 100), (1e4, 0), (0, 7.3)]:
        x = numbers() * factor + offset
        coded = encode(x, bits, group)
        off = np.abs(np.asarray(coded.astype(jnp.float32)) - np.asarray(x))
        slack = 4e-7 * float(np.abs(x).max())  # of float32 itself
        assert (off <= half_scale(coded) + slack).all()
        # The scale is no wider than the spread and float16 ask for.
        spread = np.asarray(codes._grouped(x, group))
        low = np.abs(spread).max((-3, -1)) * 2**-10 + 6e-8
        most = (np.ptp(spread, (-3, -1)) + low) / (2**bits - 1) * (1 + 2**-9) + 6e-8
        assert (np.asarray(coded.scale, np.float32) <= most).all()


def test_numbers_beyond_float16_are_cut_to_it():
    got = encode(jnp.array([[[[1e6, -1e6] + [0.0] * 30]]]), 8, (1, 32))
    assert np.isfinite(np.asarray(got.astype(jnp.float32))).all()


@pytest.mark.parametrize("bits", codes.BITS)
def test_bytes_are_the_bits_and_a_scale_and_zero_a_group(bits):
    kv = empty(2, 3, 128, 64, jnp.bfloat16, bits=bits)
    held = 2 * 3 * 128 * 64 * (bits + 32 / 32) / 8
    assert kv.k.nbytes == kv.v.nbytes == held
    assert measured_bytes((kv.k, kv.v)) == 2 * held
    assert kv.k.shape == (2, 3, 128, 64) and kv.k.dtype == jnp.bfloat16


@pytest.mark.parametrize("group", GROUPS)
def test_an_opened_tile_is_that_part_of_the_whole(group):
    coded = encode(numbers(), 4, group)
    whole = coded.astype(jnp.float32)
    tile = jax.jit(lambda x, at: x.open(at, 32, jnp.float32))(coded, 32)
    np.testing.assert_array_equal(tile, whole[:, :, 32:])


def test_rating_by_tiles_equals_rating_the_whole():
    coded = encode(numbers((1, 2, 300, 32)), 4, (1, 32))
    got = jax.jit(lambda x: codes.by_tiles(lambda k: k.sum(-1), x))(coded)
    np.testing.assert_allclose(got, coded.astype(jnp.float32).sum(-1), atol=1e-5)


@pytest.mark.parametrize("coded", [True, False])
def test_tiles_of_a_rating_with_axes_of_its_own_fall_into_their_places(coded):
    x = numbers((1, 2, 300, 32))
    x = encode(x, 8, (1, 32)) if coded else jnp.asarray(x)

    def rate(k):
        assert k.shape[2] == codes.TILE
        return jnp.stack([k.sum(-1), k.max(-1)], 2)

    whole = x.astype(jnp.float32)
    got = jax.jit(lambda x: codes.by_tiles(rate, x, always=True))(x)
    np.testing.assert_allclose(got[:, :, 0], whole.sum(-1), atol=1e-5)
    np.testing.assert_allclose(got[:, :, 1], whole.max(-1), atol=1e-5)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("group", GROUPS)
def test_attention_over_codes_equals_attention_over_what_they_stand_for(queries, group):
    slots = 576
    k, v = (encode(numbers((2, 2, slots, 32), s), 2, group) for s in (1, 2))
    q = numbers((2, queries, 4, 32), 3)
    q_pos = jnp.tile(slots + jnp.arange(queries), (2, 1))
    k_pos = jnp.tile(jnp.arange(slots), (2, 1, 1))
    k_pos = k_pos.at[0, :, 570:].set(-1).at[1, :, 400:].set(-1)

    @jax.jit
    def both(k, v):
        out, lse = cached_attention(q, k, v, q_pos, k_pos, length=570)
        return out, lse, column_sums(q, k, lse, q_pos, k_pos)

    for got, want in zip(
        both(k, v), both(k.astype(q.dtype), v.astype(q.dtype)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("queries", [1, 16])
def test_coded_slots_are_never_opened_whole(queries):
    slots = 8192
    kv = jax.eval_shape(lambda: empty(1, 2, slots, 64, jnp.float32, bits=4))
    q = jax.ShapeDtypeStruct((1, queries, 4, 64), jnp.float32)
    q_pos = jax.ShapeDtypeStruct((1, queries), jnp.int32)
    step = jax.jit(lambda q, kv, at: cached_attention(q, kv.k, kv.v, at, kv.pos))
    held = step.lower(q, kv, q_pos).compile().memory_analysis().temp_size_in_bytes
    opened = 2 * 2 * slots * 64 * 4
    assert held < opened / 8


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: codes.check_bits("h2o", 3), "bits is 3; use 2, 4 or 8"),
        (lambda: codes.channels(2, 2), "do not fill bytes"),
    ],
)
def test_widths_without_codes_are_refused(wrong, says):
    with pytest.raises(LclmError, match=says):
        wrong()
