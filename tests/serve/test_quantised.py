"""Policies that hold codes, against references that know every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import cache as policies
from lclm.cache.base import KV, Heads, Layer, measured_bytes
from lclm.cache.expected import ExpectedAttention
from lclm.cache.policies import Full
from lclm.cache.quantised import Quantised
from lclm.cache.step import make_step
from lclm.config import AttentionSpec, RopeSpec
from lclm.errors import LclmError
from lclm.ops import codes
from tests.serve.test_policies import SPEC, random_heads
from tests.tiny import tiny_config, tiny_lm, tokens

LENGTH, ROOM = 30, 32
SMALL = Quantised(bits=2, residual=8, group=4)
LAYER = Layer(0, SPEC)


@functools.partial(jax.jit, static_argnames="policy")
def call(policy, cache, part: Heads, start, count):
    at = jnp.arange(part.q.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(at < count, start + at, -1)
    step = make_step(tiny_config(), positions, start=start)
    return policy.attend(cache, part, step, LAYER)


def run(policy, heads: Heads, chunk: int):
    """The policy's attention over all tokens, and what it stores."""
    length = heads.q.shape[1]
    cache, outs = policy.init(LAYER, 1, ROOM, jnp.float32), []
    for at in range(0, length, chunk):
        count = min(chunk, length - at)
        pad = ((0, 0), (0, chunk - count), (0, 0), (0, 0))
        part = jax.tree.map(lambda x: jnp.pad(x[:, at : at + count], pad), heads)  # noqa: B023
        out, cache = call(policy, cache, part, jnp.array([at], jnp.int32), count)
        outs.append(out[:, :count])
    return np.asarray(jnp.concatenate(outs, 1)), cache


@functools.cache
def stored(length: int = LENGTH) -> KV:
    """Rotated keys and values of every token, as they are."""
    _, cache = run(Full(), random_heads(length), length)
    return jax.tree.map(lambda x: x[:, :, :length], cache.groups[0])


def reference(packed_of, k_codes, v_codes, chunk: int) -> np.ndarray:
    """Each token attends to those of its call, and older ones as they were packed."""
    heads, kv = random_heads(LENGTH), stored()
    q = np.asarray(stored_queries(heads))
    out = np.zeros_like(q)
    for i, n in np.ndindex(LENGTH, SPEC.heads):
        old = packed_of(i // chunk * chunk)
        h = n // (SPEC.heads // SPEC.kv_heads)
        k, v = (
            np.concatenate([coded[0, h, :old], np.asarray(x)[0, h, old : i + 1]])
            for coded, x in ((k_codes, kv.k), (v_codes, kv.v))
        )
        p = np.exp(k @ q[0, i, n] * SPEC.head_dim**-0.5)
        out[0, i, n] = p @ v / p.sum()
    return out


def stored_queries(heads: Heads):
    at = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    return make_step(tiny_config(), at).rotate(heads.q, SPEC.rope)


def decoded(x, bits, group):
    return np.asarray(codes.encode(x, bits, group).astype(jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7])
def test_tokens_before_a_call_are_read_as_codes_and_its_own_as_they_are(chunk):
    kv = stored()
    k, v = (decoded(x, 4, (1, 8)) for x in (kv.k, kv.v))
    got, _ = run(Full(bits=4), random_heads(LENGTH), chunk)
    np.testing.assert_allclose(got, reference(lambda n: n, k, v, chunk), atol=2e-5)


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_quantised_codes_keys_by_channel_values_by_token_behind_a_residual(chunk):
    kv, most = stored(), (LENGTH - 8) // 4 * 4
    k = decoded(kv.k[:, :, :most], 2, (4, 1))
    v = decoded(kv.v[:, :, :most], 2, (1, 4))
    got, _ = run(SMALL, random_heads(LENGTH), chunk)
    want = reference(lambda n: max(n - 8, 0) // 4 * 4, k, v, chunk)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.slow
def test_tokens_packed_one_by_one_equal_all_packed_at_once():
    kv, most = stored(), (LENGTH - 8) // 4 * 4
    for chunk in (1, 7, LENGTH):
        _, cache = run(SMALL, random_heads(LENGTH), chunk)
        old, recent = cache.groups
        assert old.pos[0, 0].tolist() == [*range(most), -1, -1, -1, -1]
        assert sorted(recent.pos[0, 0].tolist()) == [-1, -1, *range(most, LENGTH)]
        for got, x, group in ((old.k, kv.k, (4, 1)), (old.v, kv.v, (1, 4))):
            want = codes.encode(x[:, :, :most], 2, group)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(a[:, :, : b.shape[2]], b)


@pytest.mark.slow
def test_a_text_within_the_residual_is_exact():
    text = tokens(2, 20)
    lm = tiny_lm()
    np.testing.assert_allclose(
        lm.nll(text, cache="quantised:residual=20,group=4", chunk=16),
        lm.nll(text, chunk=16),
        atol=3e-5,
    )


@pytest.mark.parametrize("bits", codes.BITS)
def test_quantised_bytes_are_those_of_the_paper_and_the_residual(bits):
    spec = AttentionSpec(8, 4, 64, RopeSpec(context=64))
    cache = jax.eval_shape(
        lambda: Quantised(bits=bits).init(Layer(0, spec), 3, 1000, jnp.bfloat16)
    )
    packed = (1000 - 128) // 32 * 32
    values = 2 * 3 * 4 * 64
    numbers = values * (packed * (bits + 32 / 32) / 8 + (128 + 32) * 2)
    positions = 3 * 4 * (packed + 128 + 32)
    held = jax.tree.leaves(cache)
    assert sum(x.size * x.dtype.itemsize for x in held) == numbers + positions


def test_a_decoding_step_opens_no_more_than_tiles():
    spec = AttentionSpec(4, 2, 64, None)
    policy, length = Quantised(bits=4), 8192
    cache = jax.eval_shape(lambda: policy.init(Layer(0, spec), 1, length, jnp.float32))
    shapes = [jax.ShapeDtypeStruct((1, 1, n, 64), jnp.float32) for n in (4, 2, 2)]

    def one(cache, heads, start):
        step = make_step(tiny_config(), start[:, None], start=start)
        return policy.attend(cache, heads, step, Layer(0, spec))

    step = jax.jit(one, donate_argnums=0)
    start = jax.ShapeDtypeStruct((1,), jnp.int32)
    used = step.lower(cache, Heads(*shapes), start).compile().memory_analysis()
    opened = 2 * 2 * length * 64 * 4
    assert used.temp_size_in_bytes < opened / 8


@pytest.mark.slow
def test_a_coded_context_is_saved_grown_and_read_again(tmp_path):
    lm, text = tiny_lm(), tokens(1, 37)[0].tolist()
    cache = "quantised:residual=8,group=4"
    context = lm.prefill(text, cache=cache, chunk=16)
    want = context.generate([], 12).tokens
    assert want == lm.generate(text, 12, cache=cache, chunk=16).tokens
    context.save(tmp_path / "read.safetensors")
    again = lm.load_context(tmp_path / "read.safetensors")
    assert again.generate([], 12).tokens == want
    held = measured_bytes(again.session.caches)
    assert held == measured_bytes(context.session.caches)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("full:bits=3", "full: bits is 3; use 2, 4 or 8"),
        ("h2o:bits=16", "h2o: bits is 16"),
        ("locret:bits=4,positions=slot", "use positions=absolute"),
        ("quantised:bits=0", "use 2, 4 or 8"),
        ("quantised:residual=100", "no multiple of group 32; use 96"),
        ("quantised:residual=16", "at least 32"),
        ("quantised:group=0", "at least 1"),
    ],
)
def test_bad_widths_and_residuals_are_refused(policy, says):
    with pytest.raises(LclmError, match=says):
        policies.make(policy)


@pytest.mark.parametrize("policy", ["full:bits=8", "quantised"])
def test_codes_of_keys_whose_rotation_moves_are_refused(policy):
    lm = tiny_lm(rope=RopeSpec(kind="dynamic", factor=2.0, context=16))
    with pytest.raises(LclmError, match="dynamic"):
        lm.nll(tokens(1, 10), cache=policy)


@pytest.mark.parametrize("bits", [0, 4])
def test_expected_attention_rates_a_cache_a_tile_at_a_time(bits):
    layer, slots = Layer(0, AttentionSpec(4, 2, 64, RopeSpec(context=64))), 8192
    policy = ExpectedAttention(budget=slots, bits=bits)
    cache = jax.eval_shape(lambda: policy.init(layer, 1, slots, jnp.float32))

    @jax.jit
    def rate(cache):
        notes = dict(cache.extra)
        return policy.rate(cache.groups[0], notes.pop("score"), notes, layer)

    used = rate.lower(cache).compile().memory_analysis()
    opened = 2 * 2 * slots * 64 * 4
    assert used.temp_size_in_bytes < opened / 4
