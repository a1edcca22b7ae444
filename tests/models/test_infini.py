"""Infini-attention: the published equations, at any split, with packed documents."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.blocks import MIXERS
from lclm.blocks.infini import Infini, is_gate
from lclm.cache.step import make_step
from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
    Run,
    from_dict,
    to_dict,
)
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.models.decoder import init_params, param_shapes
from lclm.ops.infini import EPS, empty_state, feature, infini_attention
from lclm.specs import InfiniSpec
from tests.tiny import lively, tokens

SPEC = InfiniSpec(AttentionSpec(4, 2, 6, None), segment=4)
ROPE = dataclasses.replace(
    SPEC, attention=AttentionSpec(4, 2, 8, RopeSpec(context=64)), segment=8
)
PACKED = [*range(9), *range(2), *range(6), -1, -1]
HOLES = [-1, *range(5), -1, 5, 6, -1, -1, 7, 8, 9, 0, -1, 1, 2, 3]


def still(x, at):
    """No rotation."""
    return x


def spin(x, at):
    """A rotation of channel pairs in the type of x."""
    angle = at[..., None, None] * (1.0 / 3.0 ** jnp.arange(x.shape[-1] // 2))
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def naive(q, k, v, gate, positions, spec, turn=still):
    """Segment by segment, token by token, one row and kv head after another."""
    rows = []
    a = spec.attention
    for b, row in enumerate(np.asarray(positions)):
        outs = [jnp.zeros(v.shape[2:], v.dtype)[:1].repeat(a.heads, 0)] * len(row)
        real = [t for t, p in enumerate(row) if p >= 0]
        starts = [n for n, t in enumerate(real) if row[t] == 0] + [len(real)]
        for lo, hi in itertools.pairwise(starts):
            document(q[b], k[b], v[b], gate, real[lo:hi], spec, turn, outs)
        rows.append(jnp.stack(outs))
    return jnp.stack(rows)


def document(q, k, v, gate, index, spec, turn, outs):
    """One document's outputs, into `outs`; kv heads repeated in interleaved order."""
    group = spec.attention.heads // spec.attention.kv_heads
    size, share = spec.segment, jax.nn.sigmoid(gate)[:, None, None]
    memory = norm = 0.0
    for s in range(0, len(index), size):
        part = np.array(index[s : s + size])
        at = jnp.arange(s, s + len(part)) % (size if spec.bounded else 10**6)
        qr, kr = turn(q[part][None], at[None])[0], turn(k[part][None], at[None])[0]
        kr, plain, values = (jnp.repeat(y, group, 1) for y in (kr, k[part], v[part]))
        score = jnp.einsum("tnh,snh->nts", qr, kr) * spec.attention.head_dim**-0.5
        causal = np.tril(np.ones((len(part), len(part)), bool))
        weights = jax.nn.softmax(jnp.where(causal, score, -jnp.inf), -1)
        mixed = jnp.einsum("nts,sne->nte", weights, values)
        x, y = (jax.nn.elu(z).swapaxes(0, 1) + 1 for z in (q[part], plain))
        written = values.swapaxes(0, 1)
        if s > 0:
            recall = (x @ memory) / jnp.maximum(x @ norm, EPS)
            mixed = share * recall + (1 - share) * mixed
            if spec.rule == "delta":
                written = written - (y @ memory) / jnp.maximum(y @ norm, EPS)
        elif not spec.bypass:
            mixed = (1 - share) * mixed
        for i, t in enumerate(part):
            outs[t] = mixed[:, i]
        memory = memory + y.swapaxes(1, 2) @ written
        norm = norm + y.sum(1)[..., None]


def inputs(rows, length, spec=SPEC, dtype=np.float64, seed=0):
    """Random q, k, v and gate."""
    rng, a = np.random.default_rng(seed), spec.attention
    shapes = [(rows, length, n, a.head_dim) for n in (a.heads, a.kv_heads, a.kv_heads)]
    arrays = [rng.normal(size=s) for s in (*shapes, (a.heads,))]
    return tuple(jnp.asarray(x.astype(dtype)) for x in arrays)


@functools.partial(jax.jit, static_argnames=("spec", "turn", "packed"))
def run(q, k, v, gate, positions, state=None, *, spec=SPEC, turn=spin, packed=True):
    return infini_attention(
        q, k, v, gate, positions, spec=spec, turn=turn, state=state, packed=packed
    )


def in_calls(x, positions, sizes, spec, state=None):
    """The same row read in calls of these sizes."""
    q, k, v, gate = x
    dtype = q.dtype
    state = empty_state(spec, q.shape[0], dtype) if state is None else state
    outs, at = [], 0
    for size in sizes:
        cut = slice(at, at + size)
        out, state = run(
            q[:, cut], k[:, cut], v[:, cut], gate, positions[:, cut], state, spec=spec
        )
        outs.append(out)
        at += size
    return jnp.concatenate(outs, 1), state


def same(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def wave(shape, a):
    """The input generator of the golden vectors."""
    return jnp.asarray(np.sin(a * (np.arange(np.prod(shape)) + 1)).reshape(shape))


def test_the_delta_rule_gives_the_golden_vectors():
    with jax.enable_x64(True):
        one = AttentionSpec(1, 1, 2, None)
        spec = InfiniSpec(one, segment=2, bypass=False)
        q, k, v = (wave((1, 6, 1, 2), a) for a in (0.7, 0.9, 1.1))
        positions, gate = jnp.arange(6)[None], jnp.array([0.3])
        state = empty_state(spec, 1, jnp.float64)
        out, state = run(q, k, v, gate, positions, state, spec=spec, turn=still)
        want = {
            0: [0.37925996, 0.34406169],
            2: [-0.01706539, 0.21315586],
            5: [0.00029855, -0.20461813],
        }
        for t, values in want.items():
            np.testing.assert_allclose(out[0, t, 0], values, atol=1e-8)
        memory = (state.memory + state.open_memory)[0, 0]
        norm = (state.norm + state.open_norm)[0, 0]
    np.testing.assert_allclose(
        memory, [[-0.70168790, -1.64462439], [0.46966261, 0.11090838]], atol=1e-8
    )
    np.testing.assert_allclose(norm, [7.20649083, 6.65874392], atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, bypass", [("linear", True), ("delta", True), ("delta", False)]
)
def test_outputs_and_gradients_are_those_of_a_token_by_token_reference(rule, bypass):
    spec = dataclasses.replace(SPEC, rule=rule, bypass=bypass, bounded=bypass)
    positions = np.array([PACKED, HOLES])
    with jax.enable_x64(True):
        x = inputs(2, positions.shape[1])
        weight = jnp.asarray(np.random.default_rng(1).normal(size=x[0].shape))

        def loss(x, forward):
            out = forward(*x)
            return (weight * out).sum(), out

        def ours(*x):
            return run(*x, jnp.asarray(positions), spec=spec)[0]

        def theirs(*x):
            return naive(*x, positions, spec, spin)

        both = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
        (slopes, out), (want_slopes, want) = both(x, ours), both(x, theirs)
        same(out, want, 1e-12)
        same(slopes, want_slopes, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-5)])
def test_any_split_into_calls_gives_the_same_outputs_and_state(rule, dtype, tolerance):
    spec = dataclasses.replace(SPEC, rule=rule)
    with jax.enable_x64(dtype == "float64"):
        positions = jnp.asarray(np.array([PACKED, HOLES], np.int32))
        x = inputs(2, len(PACKED), dtype=dtype)
        whole, end = in_calls(x, positions, [len(PACKED)], spec)
        dense, _ = run(*x, positions, spec=spec)
        same(dense, whole, tolerance)
        for sizes in ([1] * len(PACKED), [9, 1, 9], [1, 9, 9]):
            out, state = in_calls(x, positions, sizes, spec)
            same(out, whole, tolerance)
            same(state, end, tolerance)


@pytest.mark.slow
def test_padding_and_empty_calls_leave_every_leaf_of_the_state_alone():
    x = inputs(1, 7, dtype=np.float32)
    _, before = in_calls(x, jnp.arange(7)[None], [7], SPEC)
    for size in (1, 6):
        hidden = jnp.full((1, size), -1)
        _, after = run(*(y[:, :size] for y in x[:3]), x[3], hidden, before)
        same(after, before, 0)


@pytest.mark.slow
def test_gradients_pass_through_the_state():
    with jax.enable_x64(True):
        x, positions = inputs(2, 14), jnp.asarray(np.tile(np.arange(14), (2, 1)))

        def loss(x, sizes):
            out, state = in_calls(x, positions, sizes, SPEC)
            sums = sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(state))
            return (jnp.cos(out)).sum() + sums

        slopes = jax.jit(jax.grad(loss), static_argnums=1)
        same(slopes(x, (3, 7, 1, 3)), slopes(x, (14,)), 1e-11)


@pytest.mark.slow
def test_a_row_alone_equals_the_row_in_a_ragged_batch():
    x = inputs(3, 11, dtype=np.float32)
    lengths = np.array([11, 3, 6])
    positions = np.where(np.arange(11) < lengths[:, None], np.arange(11), -1)
    out, state = in_calls(x, jnp.asarray(positions), [11], SPEC)
    for b, n in enumerate(lengths):
        alone = tuple(y[b : b + 1, :n] for y in x[:3])
        one, end = in_calls((*alone, x[3]), jnp.arange(n)[None], [n], SPEC)
        same(one, out[b : b + 1, :n], 2e-5)
        same(end, jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], state), 2e-5)


def test_the_aligned_form_equals_the_form_for_any_place():
    x, at = inputs(2, 14, dtype=np.float32), np.tile(np.arange(14), (2, 1))
    at[1, 9:] = -1
    for positions in (at, np.roll(at, 3, 1)):
        fast = run(*x, jnp.asarray(positions), packed=False)[0]
        same(fast, run(*x, jnp.asarray(positions))[0], 2e-6)


def test_a_shut_gate_is_attention_inside_segments():
    q, k, v, gate = inputs(1, 11)
    spec = dataclasses.replace(SPEC, bypass=False)
    out = run(q, k, v, jnp.full_like(gate, -1e9), jnp.arange(11)[None], spec=spec)[0]
    for lo in range(0, 11, 4):
        at = slice(lo, lo + 4)
        part = q[:, at], k[:, at], v[:, at]
        n = part[0].shape[1]
        want = naive(*part, jnp.full_like(gate, -1e9), [range(n)], SPEC, spin)
        same(out[:, at], want, 1e-5)


def test_an_open_gate_with_nothing_in_memory_gives_zero():
    q, k, v, gate = inputs(1, 4)
    spec = dataclasses.replace(SPEC, bypass=False)
    out = run(q, k, v, jnp.full_like(gate, 1e9), jnp.arange(4)[None], spec=spec)[0]
    assert not np.asarray(out).any()


@pytest.mark.parametrize("gate", [-1.0, 2.0])
def test_one_segment_with_bypass_is_causal_attention(gate):
    q, k, v, _ = inputs(2, 9)
    spec = dataclasses.replace(SPEC, segment=9)
    shut = run(q, k, v, jnp.full(4, -1e9), jnp.tile(jnp.arange(9), (2, 1)), spec=spec)
    out = run(q, k, v, jnp.full(4, gate), jnp.tile(jnp.arange(9), (2, 1)), spec=spec)
    same(out[0], shut[0], 1e-6)


def test_segments_of_one_token_are_strictly_causal_linear_attention():
    q, k, v, gate = inputs(1, 9)
    spec = dataclasses.replace(SPEC, segment=1, rule="linear")
    out = run(q, k, v, jnp.full_like(gate, 1e9), jnp.arange(9)[None], spec=spec)[0]
    sq, sk = feature(q), jnp.repeat(feature(k), 2, 2)
    scores = jnp.einsum("btnh,bsnh->bnts", sq, sk) * np.tril(np.ones((9, 9)), -1)
    want = jnp.einsum("bnts,bsne->btne", scores, jnp.repeat(v, 2, 2))
    want = want / jnp.maximum(scores.sum(-1), EPS).swapaxes(1, 2)[..., None]
    same(out[:, 1:], want[:, 1:], 1e-5)


def test_the_delta_rule_writes_nothing_where_memory_already_answers():
    spec = dataclasses.replace(SPEC, segment=1)
    q, k, v, gate = inputs(1, 1)
    again = [jnp.repeat(y, 2, 1) for y in (q, k, v)]
    _, state = in_calls((*again, gate), jnp.arange(2)[None], [2], spec)
    np.testing.assert_allclose(state.open_memory, 0, atol=1e-6)
    once = jnp.einsum("bkh,bke->bkhe", feature(k)[:, 0], v[:, 0])
    np.testing.assert_allclose(state.memory, once, atol=1e-6)


def config(layers: int = 1, **spec) -> ModelConfig:
    """A tiny model of Infini layers."""
    mixer = dataclasses.replace(ROPE, **spec)
    layer = LayerSpec(mixer, MlpSpec(48))
    return ModelConfig("infini", 97, 32, (Run((layer,), layers),), 64)


@functools.cache
def model(**spec) -> LanguageModel:
    made = config(**spec)
    return LanguageModel(made, lively(init_params(made, jax.random.key(0))))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [{}, {"rule": "linear", "bounded": False}])
def test_a_model_reads_in_chunks_of_any_size_what_it_reads_at_once(spec):
    lm, text = model(**spec), tokens(2, 37)
    logp = jax.nn.log_softmax(lm.logits(text)[:, :-1])
    want = -np.take_along_axis(np.asarray(logp), text[:, 1:, None], 2)[..., 0]
    for chunk in (1, 16):
        nll = lm.nll(text, cache="full", chunk=chunk)
        np.testing.assert_allclose(nll, want, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_a_model_generates_what_its_dense_pass_predicts():
    lm, prompt = model(), tokens(1, 13)[0].tolist()
    made = lm.generate(prompt, 12, chunk=16).tokens
    dense = np.asarray(lm.logits(np.array([prompt + made])))[0]
    assert made == dense[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.slow
def test_state_bytes_do_not_grow_with_the_text():
    lm = model()
    sizes = {lm.generate(tokens(1, n)[0].tolist(), 2).stats.bytes for n in (5, 60)}
    assert len(sizes) == 1


def test_parameters_are_those_of_attention_and_one_gate_a_head():
    shapes = param_shapes(config(layers=2))
    assert shapes["layers_0/infini/gate"] == (4,)
    assert shapes["layers_1/infini/k/weight"] == (16, 32)
    assert [p for p in shapes if is_gate(p)] == [
        f"layers_{i}/infini/gate" for i in (0, 1)
    ]


def test_a_gate_starts_where_its_spec_says():
    made = config(layers=1, gate=-2.5)
    params = init_params(made, jax.random.key(0))
    np.testing.assert_array_equal(params["layers_0"]["infini"]["gate"], -2.5)
    assert from_dict(ModelConfig, to_dict(made)) == made


def test_a_state_of_another_batch_is_refused():
    assert MIXERS["infini"] is Infini
    mixer = Infini(ROPE, 32, NormSpec())
    x = jnp.zeros((2, 3, 32))
    step = make_step(config(), jnp.tile(jnp.arange(3), (2, 1)))
    params = mixer.init(jax.random.key(0), x, step)
    with pytest.raises(LclmError, match="2 rows of this layer need"):
        mixer.apply(params, x, step, Infini.init_state(ROPE, 32, 3, jnp.float32))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"segment": 0}, "segment is 0"),
        ({"rule": "mean"}, "rule 'mean'"),
        ({"attention": AttentionSpec(4, 2, 8, window=4)}, "window=4"),
        (
            {"attention": AttentionSpec(4, 2, 8, RopeSpec("dynamic", factor=2.0))},
            "angles follow the length",
        ),
    ],
)
def test_a_spec_that_cannot_work_is_refused(change, text):
    with pytest.raises(LclmError, match=text):
        dataclasses.replace(SPEC, **change)
