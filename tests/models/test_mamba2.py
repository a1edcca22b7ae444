"""Mamba-2: the block form is the recurrence; states, padding and packing hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lclm.blocks.mamba2 import Mamba2
from lclm.cache.step import make_step
from lclm.config import LayerSpec, ModelConfig, NormSpec, Run
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.models.decoder import Decoder, init_params, unembed
from lclm.ops.ssd import gated_norm, ssd
from lclm.specs import Mamba2Spec
from tests.tiny import lively

ROWS, TIME, HEADS, SIZE, GROUPS, STATE = 2, 21, 4, 3, 2, 5
# Documents that start anywhere, padding in front, behind and between.
POSITIONS = np.array(
    [
        [4, 5, 6, 7, 8, 0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1, -1],
        [-1, -1, 0, 1, 2, -1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, -1, 2, 3, 4],
    ],
    np.int32,
)


def recurrence(x, delta, a, b, c, *, positions, state):
    """The definition, a token at a time."""
    each = x.shape[2] // b.shape[2]
    b, c = jnp.repeat(b, each, 2), jnp.repeat(c, each, 2)
    out = []
    for t in range(x.shape[1]):
        here, step = positions[:, t, None], delta[:, t]
        keep = jnp.where(here == 0, 0.0, jnp.exp(step * a))
        new = keep[..., None, None] * state
        new += (step[..., None] * x[:, t])[..., None] * b[:, t, :, None]
        state = jnp.where((here >= 0)[..., None, None], new, state)
        out.append(jnp.einsum("bnhp,bnp->bnh", state, c[:, t]))
    return jnp.stack(out, 1), state


def draw(dtype=np.float64):
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    delta = np.logaddexp(0, normal(ROWS, TIME, HEADS))
    a = -np.exp(normal(HEADS))
    x = normal(ROWS, TIME, HEADS, SIZE)
    b, c = (normal(ROWS, TIME, GROUPS, STATE) for _ in range(2))
    return x, delta, a, b, c, normal(ROWS, HEADS, SIZE, STATE)


def scores(form, weights, positions, **kw):
    """A scalar of everything that `form` returns, outputs of padding left out."""

    def run(*args):
        *args, state = args
        y, final = form(*args, positions=positions, state=state, **kw)
        y = jnp.where((positions >= 0)[..., None, None], y, 0)
        return jnp.sum(y * weights[0]) + jnp.sum(final * weights[1])

    return run


def largest(found, expected):
    return max(
        float(np.abs(f - e).max() / np.abs(e).max())
        for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 10])
def test_the_block_form_and_its_gradients_are_those_of_the_recurrence(
    chunk, monkeypatch
):
    monkeypatch.setattr("lclm.ops.ssd.BLOCK", 4)
    with jax.enable_x64(True):
        args = [jnp.asarray(v) for v in draw()]
        positions = jnp.asarray(POSITIONS)
        *most, state = args
        naive = jax.jit(recurrence)
        expected = naive(*most, positions=positions, state=state)
        found = ssd(*most, positions=positions, state=state, chunk=chunk)
        real = (POSITIONS >= 0)[..., None, None]
        assert (
            largest(np.where(real, found[0], 0), np.where(real, expected[0], 0)) < 1e-12
        )
        assert largest(found[1], expected[1]) < 1e-12
        rng = np.random.default_rng(5)
        weights = [rng.standard_normal(v.shape) for v in expected]
        which = tuple(range(6))
        slope = jax.jit(jax.grad(scores(recurrence, weights, positions), which))(*args)
        own = jax.jit(jax.grad(scores(ssd, weights, positions, chunk=chunk), which))
        assert largest(own(*args), slope) < 1e-11


def test_one_token_at_a_time_is_the_recurrence():
    with jax.enable_x64(True):
        *most, state = [jnp.asarray(v) for v in draw()]
        positions = jnp.asarray(POSITIONS)
        expected, final = recurrence(*most, positions=positions, state=state)
        step = jax.jit(ssd)
        for t in range(TIME):
            here = slice(t, t + 1)
            x, delta, a, b, c = most
            y, state = step(
                x[:, here],
                delta[:, here],
                a,
                b[:, here],
                c[:, here],
                positions=positions[:, here],
                state=state,
            )
            real = POSITIONS[:, t] >= 0
            assert largest(y[real, 0], expected[real, t]) < 1e-12
        assert largest(state, final) < 1e-12


def test_the_published_example_is_reproduced():
    """Values of a float64 study, generated from sines."""

    def sines(shape, pace):
        return jnp.asarray(
            np.sin(pace * (1.0 + np.arange(np.prod(shape)))).reshape(shape)
        )

    with jax.enable_x64(True):
        x = sines((1, 6, 2, 2), 0.7)
        y, state = ssd(
            x,
            jax.nn.softplus(sines((1, 6, 2), 0.9)),
            -jnp.exp(sines((2,), 0.5)),
            sines((1, 6, 1, 3), 1.1),
            sines((1, 6, 1, 3), 1.3),
            positions=jnp.arange(6)[None] + 9,
            state=sines((1, 2, 2, 3), 0.4),
            chunk=4,
        )
        y = y + sines((2,), 0.3)[:, None] * x
    first = [[1.24028304, 2.02144198], [2.06323495, 0.76261848]]
    last = [[-1.02828929, -0.08871112], [0.54224514, 0.75793199]]
    head = [
        [-0.75765423, -0.17278300, 0.60115527],
        [-0.09222726, 0.00129206, 0.09371431],
    ]
    y, state = np.asarray(y), np.asarray(state)
    assert np.abs(y[0, 0] - first).max() < 1e-7
    assert np.abs(y[0, 5] - last).max() < 1e-7
    assert np.abs(state[0, 0] - head).max() < 1e-7


def test_long_decays_neither_overflow_nor_lose_their_gradient():
    shape = (1, 300, 1)
    args = (jnp.ones((*shape, 2)), jnp.full(shape, 50.0), jnp.array([-16.0]))
    args += (jnp.ones((*shape, 2)),) * 2
    positions = jnp.arange(300)[None] % 100

    def total(*args):
        y, state = ssd(*args, positions=positions)
        return jnp.sum(y) + jnp.sum(state)

    value, slopes = jax.value_and_grad(total, range(5))(*args)
    assert np.isfinite(value) and value > 0
    assert all(np.isfinite(leaf).all() for leaf in slopes)


# Models of two mixers; the laws of every mixer are in tests/contracts.
SPEC = Mamba2Spec(heads=4, head_dim=4, state=4, groups=2, conv=3, chunk=4)
WIDTH = 8
CONFIG = ModelConfig(
    "mamba2",
    31,
    WIDTH,
    (Run((LayerSpec(SPEC, None),), 2),),
    64,
    NormSpec(),
    residual_float32=True,
)


def test_the_gate_comes_before_the_norm_of_each_group():
    rng = np.random.default_rng(2)
    y, gate = (jnp.asarray(rng.standard_normal((1, 3, 6)), jnp.float32) for _ in "yz")
    scale = jnp.asarray(rng.standard_normal(6), jnp.float32)
    found = gated_norm(y, gate, scale, groups=2, eps=1e-5)
    gated = np.asarray(y * gate / (1 + jnp.exp(-gate)))
    for part in (slice(0, 3), slice(3, 6)):
        size = np.sqrt((gated[..., part] ** 2).mean(-1, keepdims=True) + 1e-5)
        expected = gated[..., part] / size * scale[part]
        assert np.abs(found[..., part] - expected).max() < 1e-5


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(CONFIG, lively(init_params(CONFIG, jax.random.key(0))))


@pytest.mark.slow
def test_generation_is_greedy_dense_decoding_whatever_the_prefill_chunk(lm):
    prompt = list(range(3, 14))
    text = np.array([prompt])
    for _ in range(6):
        text = np.append(text, np.argmax(lm.logits(text)[:, -1:], -1), 1)
    expected = text[0, len(prompt) :].tolist()
    for chunk in (1, 4, 512):
        assert lm.generate(prompt, 6, chunk=chunk).tokens == expected
    ragged = lm.generate([prompt[:3], prompt], 6)
    assert ragged[1].tokens == expected
    assert ragged[0].tokens == lm.generate(prompt[:3], 6).tokens


@pytest.mark.slow
def test_training_lowers_the_loss_on_a_text_that_repeats():
    text = jnp.tile(jnp.arange(3, 10), (2, 4))
    params = init_params(CONFIG, jax.random.key(1))
    rule = optax.adam(0.02)

    def loss(params):
        hidden, _ = Decoder(CONFIG).apply({"params": params}, text[:, :-1])
        logits = unembed(CONFIG, params, hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
        return jnp.mean(losses)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, slope = jax.value_and_grad(loss)(params)
            change, state = rule.update(slope, state)
            return (optax.apply_updates(params, change), state), value

        return jax.lax.scan(step, (params, rule.init(params)), length=60)

    (params, _), values = train(params)
    assert values[-1] < 0.3 < 3 < values[0]
    prompt = [3, 4, 5, 6, 7, 8, 9, 3, 4]
    out = LanguageModel(CONFIG, params).generate(prompt, 5, chunk=4).tokens
    assert out == [5, 6, 7, 8, 9]


def test_bytes_do_not_grow_with_the_text(lm):
    assert lm.cache_bytes("full", 1_000) == lm.cache_bytes("full", 1_000_000)
    per_layer = 4 * (2 * (16 + 2 * 8) + 4 * 4 * 4)
    assert lm.cache_bytes("full", 10) == 2 * per_layer


@pytest.mark.slow
def test_initial_step_sizes_and_decays_are_in_their_ranges():
    spec = Mamba2Spec(heads=256, head_dim=1, state=1)
    mixer = Mamba2(spec, WIDTH)
    step = make_step(CONFIG, jnp.zeros((1, 1), jnp.int32))
    params = mixer.init(jax.random.key(0), jnp.zeros((1, 1, WIDTH)), step)["params"]
    sizes = jax.nn.softplus(params["dt_bias"])
    assert 0.99e-3 < sizes.min() < 2e-3 and 0.05 < sizes.max() < 0.101
    decay = jnp.exp(params["a_log"])
    assert 1 <= decay.min() < 2 and 15 < decay.max() <= 16.001
    assert (params["d"] == 1).all() and (params["norm"]["scale"] == 1).all()


def test_sizes_that_do_not_fit_are_refused():
    x, delta, b = jnp.zeros((1, 2, 4, 3)), jnp.zeros((1, 2, 4)), jnp.zeros((1, 2, 2, 5))
    call = {"positions": jnp.zeros((1, 2), jnp.int32)}
    with pytest.raises(LclmError, match="state of shape"):
        ssd(x, delta, delta[0, 0], b, b, state=jnp.zeros((2, 4, 3, 5)), **call)
    with pytest.raises(LclmError, match="chunk is 0"):
        ssd(x, delta, delta[0, 0], b, b, chunk=0, **call)
    with pytest.raises(LclmError, match="4 Mamba-2 heads over 3 groups"):
        Mamba2Spec(4, groups=3)
    with pytest.raises(LclmError, match="step_limit"):
        Mamba2Spec(4, step_limit=(0.2, 0.1))
