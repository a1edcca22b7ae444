"""Laws of rotary angles and of the rotation itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.config import ROPE_KINDS, RopeSpec
from lclm.errors import LclmError
from lclm.ops.rope import angles, frequencies, rotate
from tests.tiny import tiny_rope


def float64_angles(positions, spec, head_dim, inverse):
    product = positions.astype(np.float64)[..., None] * inverse
    factor = frequencies(spec, head_dim)[1]
    return np.cos(product) * factor, np.sin(product) * factor


FAR = np.int32([[0, 1, 1023, 1024, 131071, 524289, 1048575, 2**31 - 1, -5, -(2**31)]])


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_exact_angles_match_float64_at_every_int32_position(theta):
    exact = RopeSpec(theta=theta, angles="exact")
    inverse = theta ** -(np.arange(0, 64, 2) / 64)
    want = np.stack(float64_angles(FAR, exact, 64, inverse))
    error = np.abs(np.stack(jax.jit(lambda p: angles(p, exact, 64))(FAR)) - want)
    assert error[..., :7, :].max() < 1.5e-7, error.max()
    assert error.max() < 3e-7
    plain = np.abs(np.stack(angles(FAR, RopeSpec(theta=theta), 64)) - want)
    assert plain[..., 6, :].max() > 1e-2


def test_hf_angles_are_the_float32_product():
    inverse = frequencies(RopeSpec(), 64)[0]
    product = FAR[..., None].astype(np.float32) * inverse
    got = np.stack(angles(FAR[:, :7], RopeSpec(), 64))
    want = np.stack([np.cos(product), np.sin(product)])[:, :, :7]
    np.testing.assert_allclose(got, want, atol=5e-7)


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_exact_and_hf_angles_agree_near_the_start(kind):
    positions = np.arange(100, dtype=np.int32)[None]
    plain = angles(positions, tiny_rope(kind), 16, 100)
    exact = angles(positions, tiny_rope(kind, angles="exact"), 16, 100)
    np.testing.assert_allclose(plain, exact, atol=2e-5)


def test_exact_longrope_picks_its_set_per_row():
    spec = tiny_rope("longrope", angles="exact")
    positions = jnp.int32([[1, 2, 3], [4, 5, 6]])
    both = angles(positions, spec, 16, jnp.int32([16, 17]))
    short, long = angles(positions, spec, 16, 16), angles(positions, spec, 16, 17)
    for got, s, g in zip(both, short, long, strict=True):
        np.testing.assert_array_equal(got[0], s[0])
        np.testing.assert_array_equal(got[1], g[1])


def test_exact_angles_refuse_frequencies_that_follow_the_text():
    with pytest.raises(LclmError, match="angles='hf'"):
        angles(jnp.zeros((1, 2), jnp.int32), tiny_rope("dynamic", angles="exact"), 16)


@functools.partial(jax.jit, static_argnums=(2, 3))
def turn(x, positions, spec, layout="half"):
    return rotate(x, *angles(positions, spec, x.shape[-1]), layout)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("mode", "shift"), [("hf", 64), ("exact", 1_000_000)])
def test_scores_depend_on_the_distance_only(layout, mode, shift):
    spec = RopeSpec(angles=mode)
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 8, 2, 16))
    positions = jnp.arange(8, dtype=jnp.int32)[None]

    def scores(at):
        return jnp.einsum(
            "btnh,bsnh->bnts", turn(q, at, spec, layout), turn(k, at, spec, layout)
        )

    near, far = scores(positions), scores(positions + shift)
    np.testing.assert_allclose(near, far, atol=2e-4 if mode == "hf" else 1e-5)
    moved = jnp.einsum(
        "btnh,bsnh->bnts",
        turn(q, positions + 3, spec, layout),
        turn(k, positions, spec, layout),
    )
    assert np.abs(near - moved).max() > 0.1


def test_interleaved_equals_half_under_the_row_permutation():
    x = jax.random.normal(jax.random.key(2), (2, 5, 3, 16))
    positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    order = np.r_[0:16:2, 1:16:2]
    half = turn(x[..., order], positions, RopeSpec())
    np.testing.assert_allclose(
        turn(x, positions, RopeSpec(), "interleaved")[..., order], half, atol=1e-6
    )


def test_half_layout_equals_the_complex_product():
    x = np.asarray(jax.random.normal(jax.random.key(3), (1, 4, 1, 8)), np.float64)
    positions = np.arange(4, dtype=np.int32)[None]
    phase = np.exp(1j * np.arange(4)[:, None] * 1e4 ** -(np.arange(4) / 4))
    want = (x[0, :, 0, :4] + 1j * x[0, :, 0, 4:]) * phase
    got = turn(x.astype(np.float32), positions, RopeSpec())[0, :, 0]
    np.testing.assert_allclose(got[:, :4], want.real, atol=1e-6)
    np.testing.assert_allclose(got[:, 4:], want.imag, atol=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_partial_rotation_passes_the_tail_through_bit_for_bit(layout):
    x = jax.random.normal(jax.random.key(4), (2, 5, 3, 16), jnp.bfloat16)
    positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    out = turn(x, positions, RopeSpec(partial=0.25), layout)
    assert out.dtype == x.dtype and out.shape == x.shape
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    assert np.abs(np.float32(out - x)[1, ..., :4]).max() > 0.1


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_norms_grow_by_the_attention_factor(kind):
    x = jax.random.normal(jax.random.key(5), (1, 8, 2, 16))
    positions = jnp.arange(8, dtype=jnp.int32)[None] * 100
    spec = tiny_rope(kind)
    ratio = jnp.linalg.norm(turn(x, positions, spec), axis=-1)
    ratio = ratio / jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(ratio, frequencies(spec, 16)[1], rtol=1e-5)


def test_rotating_more_channels_than_a_head_has_is_an_error():
    table = jnp.ones((1, 2, 16))
    with pytest.raises(LclmError, match="rotate 32 channels but heads have 16"):
        rotate(jnp.ones((1, 2, 1, 16)), table, table)
