"""Megalodon: the released maths, and one function for any split of a text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import hub
from lclm.attention.chunked import Ring, chunk_attention
from lclm.blocks.megalodon import Megalodon
from lclm.cache.step import make_step
from lclm.config import from_dict, to_dict
from lclm.errors import LclmError
from lclm.hub.names import hf_names
from lclm.language_model import LanguageModel
from lclm.models.decoder import Decoder, init_params, unembed
from lclm.models.megalodon_presets import megalodon
from lclm.specs import FfnSpec, MegalodonSpec
from lclm.tree import flatten
from tests.tiny import VOCAB, lively, tokens

GOLDEN = "tests/golden"
NAMES = ("megalodon", "megalodon_plain")
MIXER = MegalodonSpec(heads=2, z=8, value=12, chunk=8, order=3, norm_groups=4)
CONFIG = megalodon(16, 2, MIXER, FfnSpec(24, gated=True, rescale=True), vocab=VOCAB)


@functools.cache
def tiny_lm() -> LanguageModel:
    return LanguageModel(CONFIG, lively(init_params(CONFIG, jax.random.key(0)), 0.2))


@functools.cache
def golden(name: str):
    """A model from its folder, what megalodon-jax says of it, and its logits."""
    bundle = hub.load(f"{GOLDEN}/{name}")
    stored = {
        k: jnp.asarray(v) for k, v in np.load(f"{GOLDEN}/{name}/golden.npz").items()
    }

    def logits(params, segments):
        hidden, _ = Decoder(bundle.config).apply(
            {"params": params}, stored["tokens"], None, segments
        )
        return unembed(bundle.config, params, hidden)

    return bundle, stored, logits


def near(got, want, at: float = 1e-5):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=at * max(1, np.abs(want).max()))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_megalodon_jax(name):
    bundle, stored, logits = golden(name)
    near(jax.jit(logits)(bundle.params, None), stored["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_packed_logits_and_gradients_are_those_of_megalodon_jax(name):
    bundle, stored, logits = golden(name)
    ids = stored["segments"]

    def loss(params):
        packed = logits(params, ids)
        return jnp.sum(jnp.where(ids[..., None] > 0, jnp.sin(packed), 0)), packed

    slope, packed = jax.jit(jax.grad(loss, has_aux=True))(bundle.params)
    near(np.where(ids[..., None] > 0, packed - stored["packed"], 0), 0.0)
    slope = flatten(slope)
    checked = 0
    for path, tensor in hf_names(bundle.config, "megalodon").items():
        if f"slope.{tensor}" in stored:
            near(slope[path], stored[f"slope.{tensor}"])
            checked += 1
    assert checked >= 17


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_survives_saving(name, tmp_path):
    bundle, _, _ = golden(name)
    hub.save_hf(tmp_path / "again", bundle)
    again = hub.load(tmp_path / "again")
    assert again.config == bundle.config
    jax.tree.map(np.testing.assert_array_equal, again.params, bundle.params)
    assert from_dict(type(CONFIG), to_dict(CONFIG)) == CONFIG


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_prefill_in_chunks_of_any_size_predicts_the_same_tokens(chunk):
    lm, text = tiny_lm(), tokens(2, 45)
    want = -np.asarray(jax.nn.log_softmax(lm.logits(text)[:, :-1]))
    want = np.take_along_axis(want, text[:, 1:, None], 2)[..., 0]
    near(lm.nll(text, chunk=chunk), want, 2e-5)


@pytest.mark.slow
def test_generation_continues_as_the_parallel_pass_would():
    lm, text = tiny_lm(), tokens(1, 19)[0].tolist()
    out = list(lm.generate(text, max_new_tokens=12).tokens)
    best = np.argmax(lm.logits(np.asarray([text + out]))[0], -1)
    assert out == best[len(text) - 1 : -1].tolist()


def attend(q, k, v, positions, ring=None, chunk=8):
    return chunk_attention(
        q, k, v, positions=positions, chunk=chunk, scale=0.7, ring=ring
    )


def dense(q, k, v, positions, chunk=8):
    """Every pair of tokens of one chunk of one document, by brute force."""
    T = positions.shape[1]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b in range(len(q)):
        document, at = 0, [None] * T
        for t in range(T):
            document += positions[b, t] == 0
            if positions[b, t] >= 0:
                at[t] = (document, positions[b, t] // chunk)
        for t in range(T):
            if at[t] is None:
                continue
            own = [s for s in range(t + 1) if at[s] == at[t]]
            scores = 0.7 * np.einsum("nh,snh->ns", q[b, t], k[b, own])
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[b, t] = np.einsum("ns,sne->ne", weights, v[b, own])
    return out


def rows(*parts):
    return np.stack(parts).astype(np.int32)


T = 29
AT = np.arange(T)
TEXTS = {
    "aligned": rows(AT, np.where(AT < 20, AT, -1)),
    "left padding": rows(np.maximum(AT - 3, -1), np.maximum(AT - 9, -1)),
    "packed": rows(np.where(AT < 11, AT, AT - 11), np.where(AT < 3, AT, AT - 3)),
    "holes": rows(np.where(AT % 2, -1, AT // 2), np.where(AT % 3, -1, AT // 3)),
}


@pytest.fixture
def heads():
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(2, T, 2, size)) for size in (4, 4, 6))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_a_token_sees_its_chunk_of_its_document_for_any_split(name, heads):
    positions = TEXTS[name]
    with jax.enable_x64():
        want, call = dense(*heads, positions), jax.jit(attend)
        real = (positions >= 0)[..., None, None]
        got, none = call(*heads, positions)
        assert none is None
        near(np.where(real, got, 0), want, 1e-12)
        rings = []
        for sizes in ((T,), (5, 1, 14, 9)):
            ring = Ring(jnp.zeros((2, 2, 8, 4)), jnp.zeros((2, 2, 8, 6)))
            at, parts = 0, []
            for size in sizes:
                cut = slice(at, at + size)
                part = (x[:, cut] for x in heads)
                y, ring = call(*part, positions[:, cut], ring)
                parts.append(y)
                at += size
            near(np.where(real, jnp.concatenate(parts, 1), 0), want, 1e-12)
            rings.append(ring)
        jax.tree.map(np.testing.assert_array_equal, *rings)


def test_a_state_of_another_batch_is_an_error():
    positions = jnp.zeros((3, 1), jnp.int32)
    state = Megalodon.init_state(MIXER, 16, 2, jnp.float32)
    x, step = jnp.zeros((3, 1, 16)), make_step(CONFIG, positions)
    with pytest.raises(LclmError, match="state of 2 rows for an input of 3"):
        Megalodon(MIXER, 16).init(jax.random.key(0), x, step, state)


@pytest.mark.slow
def test_a_state_does_not_grow_with_the_text():
    lm = tiny_lm()
    short, long = (lm.prefill(tokens(1, n)).stats for n in (16, 80))
    assert short.bytes == long.bytes > 0


def test_groups_that_leave_a_rest_are_an_error():
    bad = megalodon(18, 1, MIXER, FfnSpec(8), vocab=VOCAB)
    with pytest.raises(LclmError, match="4 groups over 18 features leaves a rest"):
        init_params(bad, jax.random.key(0))
