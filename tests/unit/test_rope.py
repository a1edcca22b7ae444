"""Laws of rotary frequencies; goldens are Hugging Face's functions in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.config import RopeSpec
from lclm.errors import LclmError
from lclm.ops.rope import angles, frequencies, rotate
from tests.tiny import tiny_rope

YARN = RopeSpec(kind="yarn", factor=16.0, original=4096, context=65536)
YARN64 = RopeSpec(kind="yarn", factor=40.0, original=4096, mscale_all_dim=1.0)
LLAMA3 = RopeSpec(
    kind="llama3",
    theta=5e5,
    factor=8.0,
    original=8192,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
LONGROPE = RopeSpec(
    kind="longrope",
    factor=32.0,
    original=4096,
    context=131072,
    short_factor=(1.0,) * 48,
    long_factor=tuple(1 + 0.5 * i for i in range(48)),
)
DYNAMIC = RopeSpec(kind="dynamic", factor=2.0, context=4096)
LINEAR_DYNAMIC = RopeSpec(kind="dynamic_linear", original=4096, context=4096)
PROPORTIONAL = RopeSpec(kind="proportional", partial=0.25, theta=1e6)


def replace(spec, **kwargs):
    return RopeSpec(**{**vars(spec), **kwargs})


GOLDEN = [  # spec, head_dim, length, samples, sum, attention factor
    (
        RopeSpec(),
        128,
        None,
        {1: 0.865964353, 32: 0.01, 63: 1.15478208e-4},
        7.45995420,
        1.0,
    ),
    (
        RopeSpec(kind="linear", factor=8.0),
        128,
        None,
        {0: 0.125, 63: 1.44347759e-5},
        0.93249428,
        1.0,
    ),
    (
        DYNAMIC,
        128,
        16384,
        {1: 0.839625776, 32: 3.72172147e-3, 63: 1.6496886e-5},
        6.23532839,
        1.0,
    ),
    (
        YARN,
        128,
        None,
        {
            20: 0.0562341288,
            32: 5.67307696e-3,
            45: 1.51771645e-4,
            46: 8.33450904e-5,
            63: 7.21738797e-6,
        },
        7.36523477,
        1.2772588722,
    ),
    (
        RopeSpec(kind="yarn", factor=4.0, original=32768, theta=1e6),
        128,
        None,
        {32: 6.02941145e-4, 63: 3.10234441e-7},
        5.14403477,
        1.1386294361,
    ),
    (  # the upper cut point lies past the last pair
        RopeSpec(kind="yarn", factor=4.0, original=131072),
        128,
        None,
        {50: 0.000637410034, 63: 5.31199657e-05},
        7.45829727,
        1.138629436112,
    ),
    (
        replace(YARN64, mscale=1.0),
        64,
        None,
        {16: 5.50000044e-3, 31: 3.33380353e-6},
        3.94893630,
        1.0,
    ),
    (
        replace(YARN64, mscale=0.707, truncate=False),
        64,
        None,
        {16: 5.52406255e-3},
        3.95166309,
        0.9210423553,
    ),
    (
        LLAMA3,
        128,
        None,
        {
            28: 3.21144611e-3,
            29: 2.16657063e-3,
            34: 1.78507791e-4,
            35: 9.5562129e-5,
            63: 3.06892588e-7,
        },
        5.38605820,
        1.0,
    ),
    (
        LONGROPE,
        96,
        5000,
        {24: 7.6923077e-4, 47: 4.94501046e-6},
        2.70036972,
        1.1902380714,
    ),
    (LONGROPE, 96, 4096, {24: 0.01}, 5.72694143, 1.1902380714),
    (PROPORTIONAL, 128, None, {15: 0.0392418988, 16: 0.0, 63: 0.0}, 4.98757799, 1.0),
]


@pytest.mark.parametrize(
    ("spec", "head_dim", "length", "samples", "total", "factor"), GOLDEN
)
def test_frequencies_equal_hugging_face(spec, head_dim, length, samples, total, factor):
    inverse, attention = frequencies(spec, head_dim, length)
    assert inverse.dtype == np.float32 and inverse.shape == (head_dim // 2,)
    for i, value in samples.items():
        np.testing.assert_allclose(inverse[i], value, rtol=1e-6)
    np.testing.assert_allclose(inverse.sum(dtype=np.float64), total, rtol=1e-6)
    np.testing.assert_allclose(attention, factor, rtol=1e-9)


@pytest.mark.parametrize(
    "spec",
    [
        RopeSpec(kind="linear", factor=1.0),
        RopeSpec(kind="ntk", factor=1.0),
        RopeSpec(kind="yarn", factor=1.0),
        RopeSpec(kind="yarn_paper", factor=1.0),
        replace(LLAMA3, factor=1.0, theta=1e4),
        DYNAMIC,
        LINEAR_DYNAMIC,
        RopeSpec(kind="longrope", short_factor=(1.0,) * 64, long_factor=(1.0,) * 64),
        RopeSpec(kind="proportional"),
    ],
    ids=lambda s: s.kind,
)
def test_no_extension_leaves_the_default_frequencies(spec):
    inverse, factor = frequencies(spec, 128, 4096 if spec.dynamic else None)
    np.testing.assert_allclose(inverse, frequencies(RopeSpec(), 128)[0], rtol=2e-7)
    assert factor == 1.0


def test_linear_is_default_at_divided_positions():
    positions = np.arange(0, 4096, 512, dtype=np.int32)[None]
    scaled = angles(positions, RopeSpec(kind="linear", factor=8.0), 32)
    plain = angles(positions // 8, RopeSpec(), 32)
    np.testing.assert_allclose(scaled, plain, atol=2e-5)


def test_ntk_keeps_the_first_frequency_and_divides_the_last():
    plain = frequencies(RopeSpec(), 64)[0]
    scaled = frequencies(RopeSpec(kind="ntk", factor=8.0), 64)[0]
    assert scaled[0] == plain[0]
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)


def test_yarn_has_three_regimes_by_channel():
    ratio = frequencies(RopeSpec(), 128)[0] / frequencies(YARN, 128)[0]
    np.testing.assert_allclose(ratio[:21], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[46:], 16, rtol=1e-6)
    assert (np.diff(ratio[20:47]) > 0).all()


def test_paper_yarn_blends_linearly_in_rotations():
    plain = frequencies(RopeSpec(), 128)[0].astype(np.float64)
    paper = frequencies(replace(YARN, kind="yarn_paper"), 128)[0]
    gamma = np.clip((4096 * plain / (2 * np.pi) - 1) / 31, 0, 1)
    np.testing.assert_allclose(paper, plain * ((1 - gamma) / 16 + gamma), rtol=1e-5)
    assert np.abs(paper / frequencies(YARN, 128)[0] - 1).max() > 0.1


def test_zero_or_missing_betas_mean_32_and_1():
    plain = frequencies(YARN, 128)[0]
    assert (plain == frequencies(replace(YARN, beta_fast=32.0), 128)[0]).all()
    zero = replace(YARN, beta_fast=0.0, beta_slow=0.0)
    assert (plain == frequencies(zero, 128)[0]).all()


def test_llama3_has_three_regimes_by_wavelength():
    plain = frequencies(RopeSpec(theta=5e5), 128)[0]
    ratio = plain / frequencies(LLAMA3, 128)[0]
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[waves < 8192 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[waves > 8192], 8, rtol=1e-6)
    middle = ratio[(waves > 8192 / 4) & (waves < 8192)]
    assert ((middle > 1) & (middle < 8)).all() and (np.diff(middle) > 0).all()


def test_explicit_attention_factor_wins_and_squares_in_logits():
    spec = replace(YARN, attention_factor=2.0)
    x = jax.random.normal(jax.random.key(0), (1, 4, 1, 128))
    positions = np.arange(4, dtype=np.int32)[None]

    def scores(spec):
        turned = rotate(x, *angles(positions, spec, 128))
        return jnp.einsum("btnh,bsnh->bts", turned, turned)

    plain = replace(YARN, attention_factor=1.0)
    np.testing.assert_allclose(scores(spec), 4 * scores(plain), rtol=1e-5)
    assert frequencies(spec, 128)[1] == 2.0


@functools.partial(jax.jit, static_argnums=(1, 2))
def traced_frequencies(length, spec, head_dim):
    return frequencies(spec, head_dim, length)[0]


@pytest.mark.parametrize(
    "spec", [DYNAMIC, LINEAR_DYNAMIC, LONGROPE], ids=lambda s: s.kind
)
@pytest.mark.parametrize("length", [1, 4096, 4097, 5000, 131072])
def test_traced_length_equals_static_length(spec, length):
    static = frequencies(spec, 96, length)[0]
    traced = traced_frequencies(jnp.int32(length), spec, 96)
    np.testing.assert_allclose(traced, static, rtol=1e-6)


@pytest.mark.parametrize(
    "spec", [DYNAMIC, LINEAR_DYNAMIC, LONGROPE], ids=lambda s: s.kind
)
def test_a_longer_row_leaves_a_shorter_one_unchanged(spec):
    both = traced_frequencies(jnp.int32([4000, 20000]), spec, 96)
    for row, length in enumerate((4000, 20000)):
        alone = traced_frequencies(jnp.int32([length]), spec, 96)[0]
        np.testing.assert_array_equal(both[row], alone)
    assert np.abs(both[0] - both[1]).max() > 1e-4
    positions = jnp.int32([[0, 3999], [0, 19999]])
    cos, _ = angles(positions, spec, 96)
    named, _ = angles(positions, spec, 96, jnp.int32([4000, 20000]))
    np.testing.assert_array_equal(cos, named)
    np.testing.assert_allclose(cos[:1], angles(positions[:1], spec, 96)[0], atol=1e-6)


def test_longrope_is_long_strictly_past_the_original_length():
    spec, positions = tiny_rope("longrope"), jnp.zeros((1, 1), jnp.int32) + 3
    at, past = (angles(positions, spec, 16, n)[0] for n in (16, 17))
    assert np.abs(at - past).max() > 0.1
    traced = frequencies(spec, 16, jnp.int32([16, 17]))[0]
    np.testing.assert_array_equal(traced[0], frequencies(spec, 16)[0])
    np.testing.assert_array_equal(traced[1], frequencies(spec, 16, 17)[0])


@pytest.mark.parametrize(
    ("spec", "head_dim", "word"),
    [
        (RopeSpec(kind="linear"), 16, "factor is missing"),
        (RopeSpec(kind="llama3", factor=8.0), 16, "low_freq_factor"),
        (tiny_rope("longrope"), 32, "short_factor has 8 numbers; it needs 16"),
        (tiny_rope("yarn", beta_fast=1.0, beta_slow=2.0), 16, "beta_fast"),
        (tiny_rope("dynamic"), 2, "at least 4"),
        (RopeSpec(partial=0.2), 16, "even"),
        (tiny_rope("yarn", theta=1.0), 16, "theta"),
    ],
)
def test_numbers_a_kind_cannot_use_are_errors(spec, head_dim, word):
    with pytest.raises(LclmError, match=word):
        frequencies(spec, head_dim)
