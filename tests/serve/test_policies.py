"""Each policy against a reference written out token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import cache as policies
from lclm.cache.base import Heads, Layer
from lclm.cache.policies import Streaming, Window
from lclm.cache.step import make_step
from lclm.config import AttentionSpec, RopeSpec
from lclm.errors import LclmError
from lclm.ops.rope import angles, rotate
from lclm.serve.session import Session
from tests.tiny import tiny_config, tiny_lm, tokens

SPEC = AttentionSpec(4, 2, 8, RopeSpec(context=64))
LAYER = Layer(0, SPEC)


def random_heads(length: int) -> Heads:
    keys = jax.random.split(jax.random.key(3), 3)
    sizes = (SPEC.heads, SPEC.kv_heads, SPEC.kv_heads)
    return Heads(
        *(
            jax.random.normal(k, (1, length, n, SPEC.head_dim))
            for k, n in zip(keys, sizes, strict=True)
        )
    )


@functools.partial(jax.jit, static_argnames="policy")
def call(policy, cache, part: Heads, positions):
    step = make_step(
        tiny_config(),
        positions,
        far=policy.far(positions),
        start=positions[:, 0],
        exact=policy.exact_angles,
    )
    return policy.attend(cache, part, step, LAYER)


def run(policy, heads: Heads, chunk: int) -> np.ndarray:
    """The policy's attention over all tokens, `chunk` at a time."""
    length = heads.q.shape[1]
    cache = policy.init(LAYER, 1, length, jnp.float32)
    outs = []
    for at in range(0, length, chunk):
        end = min(at + chunk, length)
        positions = jnp.arange(at, end, dtype=jnp.int32)[None]
        part = Heads(*(x[:, at:end] for x in (heads.q, heads.k, heads.v)))
        out, cache = call(policy, cache, part, positions)
        outs.append(out)
    return np.asarray(jnp.concatenate(outs, 1))


def by_slots(heads: Heads, sinks: int, window: int) -> np.ndarray:
    """arXiv 2309.17453 as written: keys stored unrotated, rotated by cache slot."""
    length, group = heads.q.shape[1], SPEC.heads // SPEC.kv_heads
    slots = jnp.broadcast_to(jnp.arange(length)[:, None], (length, length))
    tables = angles(slots, SPEC.rope, SPEC.head_dim)
    # Every token as it would stand in every slot: [slot, token, head, width].
    q, k = (
        np.asarray(rotate(jnp.repeat(x, length, 0), *tables))
        for x in (heads.q, heads.k)
    )
    v, out = np.repeat(np.asarray(heads.v)[0], group, 1), []
    for i in range(length):
        seen = list(range(i + 1))
        if len(seen) > sinks + window + 1:
            seen = seen[:sinks] + seen[-(window + 1) :]
        keys = np.repeat(k[range(len(seen)), seen], group, 1)
        scores = np.einsum("nh,snh->ns", q[len(seen) - 1, i], keys)
        weights = np.exp(scores * SPEC.head_dim**-0.5)
        weights /= weights.sum(1, keepdims=True)
        out.append(np.einsum("ns,snh->nh", weights, v[seen]))
    return np.stack(out)[None]


@pytest.mark.parametrize(
    ("chunk", "sinks"),
    [
        (7, 4),
        *(
            pytest.param(chunk, sinks, marks=pytest.mark.slow)
            for chunk in (1, 7, 30)
            for sinks in (0, 1, 4)
            if (chunk, sinks) != (7, 4)
        ),
    ],
)
def test_streaming_equals_keys_rotated_by_their_cache_slot(sinks, chunk):
    heads = random_heads(30)
    got = run(Streaming(sinks=sinks, window=8), heads, chunk)
    np.testing.assert_allclose(got, by_slots(heads, sinks, 8), atol=2e-5)


def test_a_window_equals_streaming_without_sinks():
    heads = random_heads(30)
    got = run(Window(window=9), heads, 7)
    np.testing.assert_allclose(
        got, run(Streaming(sinks=0, window=8), heads, 7), atol=2e-5
    )


@pytest.mark.slow
def test_a_window_policy_equals_a_model_with_that_window():
    text = tokens(1, 40)
    np.testing.assert_allclose(
        tiny_lm().nll(text, cache="window:window=9", chunk=16),
        tiny_lm(windows=(9, 9)).nll(text, chunk=16),
        atol=3e-5,
    )


def test_layers_with_a_window_store_only_that_window():
    lm = tiny_lm(windows=(9, None))
    held = Session(lm._engine, policies.make("full"), rows=1, length=40, chunk=16)
    assert [c.groups[0].k.shape[2] for c in held.caches] == [8, 40]


def test_recompute_scores_each_token_after_a_fresh_window():
    text = tokens(1, 30)
    got = tiny_lm().nll(text, cache="recompute:window=10")
    for target in (15, 29):
        window = text[:, target - 10 : target]
        logp = jax.nn.log_softmax(tiny_lm().logits(window)[0, -1])
        np.testing.assert_allclose(
            got[0, target - 1], -logp[text[0, target]], atol=3e-5
        )


def test_recompute_generates_from_the_last_window_alone():
    text = tokens(1, 30)[0].tolist()
    lm = tiny_lm()
    got = lm.generate(text, 5, cache="recompute:window=10").tokens
    for i, token in enumerate(got):
        seen = (text + got[:i])[-10:]
        assert int(jnp.argmax(lm.logits([seen])[0, -1])) == token


def test_dynamic_rope_reads_a_chunked_prompt_as_a_dense_pass_does():
    lm = tiny_lm(rope=RopeSpec(kind="dynamic", factor=2.0, context=16))
    text = tokens(1, 40)
    dense = jax.nn.log_softmax(lm.logits(text[:, :39]))[0]
    want = -np.asarray(dense)[np.arange(39), text[0, 1:]]
    np.testing.assert_allclose(lm.nll(text, chunk=16)[0], want, atol=5e-5)


def test_streaming_refuses_rope_whose_angles_depend_on_the_length():
    lm = tiny_lm(rope=RopeSpec(kind="dynamic", factor=2.0, context=16))
    with pytest.raises(LclmError, match="dynamic"):
        lm.nll(tokens(1, 10), cache="streaming")


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("fll", "did you mean 'full'"),
        ("streaming:sink=4", "did you mean 'sinks'"),
        ("streaming:window=abc", "not a whole number"),
        ("streaming:window=1.5", "not a whole number"),
        ("streaming:window", "not key=value"),
        ("window:window=0", "at least 1"),
        ("streaming:sinks=-1", "at least 0"),
        ("recompute:window=0", "at least 1"),
        ("full:limit=0", "at least 1"),
        ({"name": "window", "window": 2.5}, "not a whole number"),
        (7, "cache policy 7"),
    ],
)
def test_a_bad_policy_is_one_clear_error(policy, says):
    with pytest.raises(LclmError, match=says):
        policies.make(policy)
