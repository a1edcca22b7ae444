"""Mamba-1: the scan against its definition, the mixer against transformers, in use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import lclm
from lclm.blocks.mamba import Mamba, check_state
from lclm.cache.step import make_step
from lclm.config import LayerSpec, MlpSpec, ModelConfig, NormSpec, Run
from lclm.errors import LclmError
from lclm.hub.names import hf_names
from lclm.language_model import LanguageModel
from lclm.models.decoder import Decoder, init_params, stack_params, unembed
from lclm.ops import scan
from lclm.ops.conv import causal_conv
from lclm.ops.scan import selective_scan
from lclm.specs import MambaSpec
from lclm.tree import flatten
from tests.hub.conftest import GOLDEN
from tests.tiny import lively, tokens

SPEC = MambaSpec(inner=24, rank=3, state=4, conv=4)
JAMBA = MambaSpec(24, 3, 4, conv=3, inner_norms=True, proj_bias=True, conv_bias=False)
# Documents, holes and padding: two rows that continue others.
POSITIONS = np.array(
    [[3, 4, 5, 0, 1, -1, 2, 0, 1, -1, -1], [-1, -1, 7, 8, 9, 10, 11, 0, 0, 1, 2]]
)
B, T, C, N = *POSITIONS.shape, 3, 4


def wave(shape, rate):
    """sin(rate), sin(2 rate), ... in an array."""
    return jnp.asarray(np.sin(rate * (np.arange(np.prod(shape)) + 1)).reshape(shape))


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def short_blocks(monkeypatch):
    """Several blocks, the last one partly filled, in a short text."""
    monkeypatch.setattr(scan, "BLOCK", 4)


def test_the_scan_has_the_reference_values(wide):
    u, z = wave((6, 2), 0.7), wave((6, 2), 0.6)
    y, end = selective_scan(
        u[None],
        wave((1, 6, 2), 0.9),
        a=-jnp.exp(wave((2, 3), 0.5)).T,
        b=wave((1, 6, 3), 1.1),
        c=wave((1, 6, 3), 1.3),
        positions=jnp.arange(1, 7)[None],
        state=wave((2, 3), 0.4).T[None],
    )
    out = (y[0] + wave((2,), 0.3) * u) * z / (1 + np.exp(-z))
    np.testing.assert_allclose(out[0], [0.46056402, 1.53817163], atol=1e-8)
    np.testing.assert_allclose(out[5], [-0.08500838, 0.37352077], atol=1e-8)
    expected = [
        [-0.41976166, -0.06605616, 0.38707869],
        [0.04579164, 0.09659822, -0.17109412],
    ]
    np.testing.assert_allclose(end[0].T, expected, atol=1e-8)


def scan_inputs():
    rng = np.random.default_rng(0)
    x, raw = rng.normal(size=(2, B, T, C))
    b, c = rng.normal(size=(2, B, T, N))
    a, h = -np.exp(rng.normal(size=(N, C))), rng.normal(size=(B, N, C))
    return [jnp.asarray(part) for part in (x, raw, a, b, c, h)]


def slow_scan(x, raw, a, b, c, h):
    """The recurrence as it is written down."""
    out = []
    for t in range(T):
        valid = (POSITIONS[:, t] >= 0)[:, None, None]
        before = jnp.where((POSITIONS[:, t] == 0)[:, None, None], 0, h)
        dt = jax.nn.softplus(raw[:, t])
        new = jnp.exp(dt[:, None] * a) * before
        new = new + (dt * x[:, t])[:, None] * b[:, t, :, None]
        h = jnp.where(valid, new, h)
        out.append(jnp.sum(h * c[:, t, :, None], 1))
    return jnp.stack(out, 1), h


def our_scan(x, raw, a, b, c, h):
    at = jnp.asarray(POSITIONS)
    return selective_scan(x, raw, a=a, b=b, c=c, positions=at, state=h)


def weighed(function):
    """A number from everything the scan returns for real tokens."""
    real = (POSITIONS >= 0)[..., None]

    def loss(*args):
        y, h = function(*args)
        return jnp.sum(jnp.where(real, jnp.sin(y), 0)) + jnp.sum(h**2)

    return loss


def test_the_scan_and_all_its_gradients_are_those_of_the_recurrence(wide, short_blocks):
    args = scan_inputs()
    real = (POSITIONS >= 0)[..., None]
    (y, h), (want_y, want_h) = our_scan(*args), slow_scan(*args)
    np.testing.assert_allclose(np.where(real, y - want_y, 0), 0, atol=1e-13)
    np.testing.assert_allclose(h, want_h, atol=1e-13)
    got = jax.grad(weighed(our_scan), range(6))(*args)
    want = jax.grad(weighed(slow_scan), range(6))(*args)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-12)


def test_gradients_in_float32_are_finite_where_decay_underflows(short_blocks):
    x, raw, a, b, c, h = (jnp.float32(p) for p in scan_inputs())
    grads = jax.grad(weighed(our_scan), range(6))(x, raw + 60, a * 40, b, c, h)
    assert all(np.isfinite(g).all() for g in grads)


def slow_conv(x, weight, bias, state):
    """A window that documents empty and padding leaves alone."""
    out, ends = np.zeros_like(x), []
    for row in range(B):
        window = list(state[row])
        for t in np.flatnonzero(POSITIONS[row] >= 0):
            if POSITIONS[row, t] == 0:
                window = [np.zeros(C)] * len(window)
            window = [*window, x[row, t]]
            taps = zip(weight[:, 0].T, window, strict=True)
            out[row, t] = bias + sum(w * v for w, v in taps)
            window = window[1:]
        ends.append(window)
    return out, np.array(ends)


def test_the_convolution_skips_padding_and_stops_at_documents(wide):
    rng = np.random.default_rng(1)
    x, state = rng.normal(size=(B, T, C)), rng.normal(size=(B, 3, C))
    weight, bias = rng.normal(size=(C, 1, 4)), rng.normal(size=C)
    real = (POSITIONS >= 0)[..., None]

    def conv(x, weight, state):
        at, offset = jnp.asarray(POSITIONS), jnp.asarray(bias)
        return causal_conv(x, weight, bias=offset, positions=at, state=state)

    want, want_end = slow_conv(x, weight, bias, state)
    x, weight, state = (jnp.asarray(p) for p in (x, weight, state))
    y, end = conv(x, weight, state)
    np.testing.assert_allclose(np.where(real, y, 0), want, atol=1e-14)
    np.testing.assert_allclose(end, want_end, atol=0)

    def loss(*args):
        y, end = conv(*map(jnp.asarray, args))
        return jnp.sum(jnp.where(real, y**2, 0)) + jnp.sum(end**3)

    check_grads(loss, (x, weight, state), 1, ["rev"], 1e-6, 1e-6)


@functools.cache
def tiny(spec=SPEC, mlp=None):
    norm = NormSpec(1e-5)
    layer = LayerSpec(spec, mlp, norm)
    config = ModelConfig(
        "mamba", 97, 16, (Run((layer,), 2),), 64, norm, residual_float32=True
    )
    return LanguageModel(config, lively(init(config), 0.2))


def init(config):
    return jax.jit(functools.partial(init_params, config))(jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("spec, mlp", [(SPEC, None), (JAMBA, MlpSpec(24))])
@pytest.mark.parametrize("chunk", [1, 7])
def test_reading_in_chunks_of_any_size_is_the_parallel_pass(spec, mlp, chunk):
    lm, text = tiny(spec, mlp), tokens(2, 24)
    logp = np.asarray(jax.nn.log_softmax(lm.logits(text)[:, :-1]))
    dense = -np.take_along_axis(logp, text[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(lm.nll(text, chunk=chunk), dense, atol=3e-5)


@pytest.mark.slow
def test_generation_continues_a_ragged_batch_as_each_row_alone():
    lm = tiny()
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 17, 9)]
    together = lm.generate(prompts, 8, chunk=8)
    for prompt, made in zip(prompts, together, strict=True):
        text = list(prompt)
        for _ in range(8):
            text.append(
                int(
                    lm.logits(np.array([text + [0] * (25 - len(text))]))[
                        0, len(text) - 1
                    ].argmax()
                )
            )
        assert made.tokens == text[len(prompt) :]


@pytest.mark.slow
def test_state_bytes_do_not_grow_with_the_text():
    lm = tiny()
    assert lm.cache_bytes("full", 1_000) == lm.cache_bytes("full", 1_000_000)
    per_layer = (SPEC.conv - 1 + SPEC.state) * SPEC.inner * 4
    assert lm.cache_bytes("full", 1_000, batch=3) == 3 * 2 * per_layer


def test_a_saved_context_continues_as_the_one_it_was(tmp_path):
    lm = tiny()
    context = lm.prefill(tokens(1, 9)[0], chunk=8)
    context.save(tmp_path / "c.safetensors")
    again = lm.load_context(tmp_path / "c.safetensors").generate([3, 4], 6)
    assert again.tokens == context.generate([3, 4], 6).tokens


def test_stacked_layers_are_the_same_model():
    lm, text = tiny(), jnp.asarray(tokens(1, 12))
    stacked = stack_params(lm.config, lm.params)
    out, _ = Decoder(lm.config, scan=True).apply({"params": stacked}, text)
    logits = unembed(lm.config, lm.params, out)
    np.testing.assert_allclose(logits, lm.logits(text), atol=1e-4)


def golden(name):
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return lclm.load(GOLDEN / name), dict(arrays)


@pytest.mark.parametrize("name", ["mamba", "mamba_bias"])
def test_final_states_are_those_of_transformers(name):
    lm, want = golden(name)
    context = lm.prefill(want["tokens"], chunk=16)
    for i, state in enumerate(context.session.caches):
        h = np.asarray(state["scan"]).swapaxes(1, 2)
        np.testing.assert_allclose(h, want[f"recurrent_{i}"], atol=2e-5)
        tail = np.asarray(state["conv"]).swapaxes(1, 2)
        theirs = want[f"conv_{i}"][..., 1:]  # transformers keeps one input more
        np.testing.assert_allclose(tail, theirs, atol=2e-5)


@pytest.mark.parametrize("name", ["mamba", "mamba_bias"])
def test_loss_and_gradients_are_those_of_transformers(name):
    lm, want = golden(name)
    text = jnp.asarray(want["tokens"])

    def loss(params):
        hidden, _ = Decoder(lm.config).apply({"params": params}, text)
        logp = jax.nn.log_softmax(unembed(lm.config, params, hidden)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, text[:, 1:, None], 2))

    value, grads = jax.jit(jax.value_and_grad(loss))(lm.params)
    np.testing.assert_allclose(value, want["loss"], rtol=1e-5)
    names = hf_names(lm.config, "mamba")
    for path, grad in flatten(grads).items():
        theirs = want[f"grad {names[path]}"]
        size = np.abs(theirs).max()
        np.testing.assert_allclose(grad, theirs, atol=3e-5 * size, err_msg=path)


WORD = 5  # tokens to copy


def words(key, rows):
    """A word, a mark (0), and the word again."""
    word = jax.random.randint(key, (rows, WORD), 1, 10)
    return jnp.concatenate([word, jnp.zeros((rows, 1), word.dtype), word], 1)


@pytest.mark.slow
def test_a_trained_model_copies_what_its_state_remembers():
    norm, spec = NormSpec(1e-5), MambaSpec(inner=64, rank=4, state=16)
    stack = (Run((LayerSpec(spec, None, norm),), 2),)
    config = ModelConfig("mamba", 10, 32, stack, 64, norm, residual_float32=True)
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, 300))

    def loss(params, text):
        hidden, _ = Decoder(config).apply({"params": params}, text[:, :-1])
        logits = unembed(config, params, hidden)[:, WORD:]
        target = text[:, 1 + WORD :]
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    @jax.jit
    def update(params, state, key):
        grads = jax.grad(loss)(params, words(key, 64))
        steps, state = optimiser.update(grads, state)
        return optax.apply_updates(params, steps), state

    params = init(config)
    state = optimiser.init(params)
    for i in range(300):
        params, state = update(params, state, jax.random.key(i))
    text = np.asarray(words(jax.random.key(999), 32))
    made = LanguageModel(config, params).generate(text[:, : WORD + 1].tolist(), WORD)
    right = [
        m.tokens == row[WORD + 1 :].tolist() for m, row in zip(made, text, strict=True)
    ]
    assert np.mean(right) >= 0.9


def test_initial_values_are_those_of_the_paper():
    spec = MambaSpec(inner=512, rank=8, state=16)
    config = ModelConfig("mamba", 8, 64, (Run((LayerSpec(spec, None),), 1),), 64)
    mixer = init(config)["layers_0"]["mamba"]
    steps = np.asarray(jax.nn.softplus(mixer["dt"]["bias"]))
    assert 0.99e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.101
    assert np.median(steps) == pytest.approx(0.01, rel=0.25)
    np.testing.assert_allclose(np.exp(mixer["a_log"][7]), np.arange(1, 17), rtol=1e-5)
    assert (mixer["d"] == 1).all()
    assert np.abs(mixer["dt"]["weight"]).max() == pytest.approx(8**-0.5, rel=0.01)
    assert np.abs(mixer["conv"]["weight"]).max() == pytest.approx(0.5, rel=0.01)


def test_a_state_of_other_rows_is_refused():
    lm = tiny()
    fresh = Mamba.init_state(SPEC, 16, 3, jnp.float32)
    step = make_step(lm.config, jnp.zeros((2, 1), jnp.int32))
    mixer = Mamba(SPEC, 16, NormSpec())
    with pytest.raises(LclmError, match=r"\(3, 3, 24\).*2 rows needs \(2, 3, 24\)"):
        mixer.apply(
            {"params": lm.params["layers_0"]["mamba"]},
            jnp.zeros((2, 1, 16)),
            step,
            fresh,
        )
    with pytest.raises(LclmError, match="'scan' is missing"):
        check_state({"conv": fresh["conv"]}, fresh)


@pytest.mark.parametrize("field", ["inner", "rank", "state", "conv"])
def test_a_size_below_one_is_refused(field):
    sizes = {"inner": 8, "rank": 2, "state": 4, "conv": 4} | {field: 0}
    with pytest.raises(LclmError, match=f"{field} is 0"):
        MambaSpec(**sizes)
