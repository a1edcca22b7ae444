"""InfiniPot: what a full pot keeps, where it stands, and that nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import cache as policies
from lclm.cache import infinipot
from lclm.cache.base import Heads, Layer, measured_bytes
from lclm.cache.infinipot import CATALYST, InfiniPot
from lclm.cache.step import make_step
from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    RopeSpec,
    find_runs,
)
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.models.decoder import init_params
from lclm.ops.codes import encode
from lclm.ops.rope import angles, rotate
from lclm.serve.session import Session
from lclm.specs import MambaSpec
from tests.tiny import VOCAB, dense_nll, lively, tiny_lm, tokens

POT = InfiniPot(budget=26, keep=8, sinks=2, catalyst=(5, 6))  # 24 of the text
NOVEL = InfiniPot(budget=26, keep=8, sinks=0, alpha=1.0)
SPEC = AttentionSpec(4, 2, 8, RopeSpec(context=64))


def random_heads(length: int, seed: int = 3) -> Heads:
    keys = jax.random.split(jax.random.key(seed), 3)
    counts = (SPEC.heads, SPEC.kv_heads, SPEC.kv_heads)
    return Heads(
        *(
            jax.random.normal(key, (1, length, n, SPEC.head_dim))
            for key, n in zip(keys, counts, strict=True)
        )
    )


def part(heads: Heads, start: int, stop: int) -> Heads:
    return Heads(*(x[:, start:stop] for x in (heads.q, heads.k, heads.v)))


def config_of(spec: AttentionSpec) -> ModelConfig:
    return ModelConfig(
        "llama", VOCAB, 32, find_runs((LayerSpec(spec, MlpSpec(8)),)), 64
    )


@functools.partial(jax.jit, static_argnames=("policy", "layer"))
def append(cache, heads, nll, start, *, policy, layer):
    """Read eight tokens and note their losses."""
    positions = start[:, None] + jnp.arange(8, dtype=jnp.int32)
    step = make_step(config_of(layer.spec), positions, start=start)
    _, cache = policy.attend(cache, heads, step, layer)
    return policy.observe(cache, nll, positions)


@functools.partial(jax.jit, static_argnames=("policy", "layer"))
def distil(cache, heads, start, *, policy, layer):
    """The overflow step with a catalyst of two tokens."""
    positions = start[:, None] + jnp.arange(2, dtype=jnp.int32)
    step = make_step(config_of(layer.spec), positions, start=start, weigh=True)
    _, cache = policy.attend(cache, heads, step, layer)
    return policy.compact(cache, layer)


class Pot:
    """One layer's pot, driven as the engine drives it."""

    def __init__(self, policy: InfiniPot, spec: AttentionSpec = SPEC):
        self.how = {"policy": policy, "layer": Layer(0, spec)}
        self.cache = policy.init(self.how["layer"], 1, 64, jnp.float32)
        self.start = jnp.zeros(1, jnp.int32)

    def read(self, heads: Heads, nll: np.ndarray) -> None:
        for at in range(0, heads.q.shape[1], 8):
            told = jnp.asarray(nll[at : at + 8], jnp.float32)[None]
            eight = part(heads, at, at + 8)
            self.cache = append(self.cache, eight, told, self.start, **self.how)
            self.start = self.start + 8

    def distil(self, catalyst: Heads) -> None:
        self.cache = distil(self.cache, catalyst, self.start, **self.how)

    def held(self, heads: Heads) -> list[list[int]]:
        """Which token stands in each place of each head, told by its value."""
        (kv,) = self.cache.groups
        found = []
        for head in range(SPEC.kv_heads):
            pos = np.asarray(kv.pos[0, 0])
            values = np.asarray(kv.v[0, head, pos >= 0])
            apart = np.abs(values[:, None] - np.asarray(heads.v[0, :, head])).max(-1)
            assert (apart.min(1) == 0).all()
            found.append(apart.argmin(1).tolist())
        return found


@pytest.mark.slow
def test_codes_that_stay_are_kept_and_those_that_move_are_coded_anew(monkeypatch):
    monkeypatch.setattr(infinipot, "TILE", 4)
    k = encode(random_heads(20).k.reshape(1, 2, 10, 16), 4, (1, 8))
    by = jnp.tile(jnp.array([0, 0, 0, -1, -3, -3, -4, 0, -9, -9], jnp.int32), (1, 2, 1))
    got = infinipot.moved(k, by, SPEC.rope)
    want = infinipot.turned(k.astype(jnp.float32), by, SPEC.rope)
    half = np.repeat(np.asarray(got.scale, np.float32), 8, -1) / 2
    gap = np.abs(got.astype(jnp.float32) - want)
    assert (gap <= half + 1e-6).all() and gap[:, :, 3].max() > 0
    stays = np.asarray(by[0, 0]) == 0
    for new, old in zip(*map(jax.tree.leaves, (got, k)), strict=True):
        np.testing.assert_array_equal(new[:, :, stays], old[:, :, stays])


@pytest.mark.slow
@pytest.mark.parametrize(
    "rope",
    [
        RopeSpec(context=64),
        RopeSpec(kind="yarn", factor=4.0, context=64, angles="exact", partial=0.5),
        None,
    ],
)
def test_survivors_stand_in_order_at_the_first_places_rotated_for_them(rope):
    spec = dataclasses.replace(SPEC, rope=rope)
    heads, catalyst = random_heads(40), random_heads(2, seed=4)
    nll = np.random.default_rng(0).random(40)
    pot = Pot(POT, spec)
    for start, stop in ((0, 24), (24, 40)):
        pot.read(part(heads, start, stop), nll[start:stop])
        pot.distil(catalyst)
    (kv,) = pot.cache.groups
    assert kv.pos[0, 0].tolist() == [*range(8), *[-1] * 18]
    for head, here in enumerate(pot.held(heads)):
        assert len(here) == 8 and here == sorted(set(here)) and here[:2] == [0, 1]
        kept, places = heads.k[:, jnp.array(here)], jnp.arange(8)[None]
        if rope is not None:
            kept = rotate(kept, *angles(places, rope, SPEC.head_dim))
        np.testing.assert_allclose(
            kv.k[0, head, :8], kept[0, :, head], atol=2e-6, rtol=1e-5
        )
        np.testing.assert_allclose(pot.cache.extra["novelty"][0, head, :8], nll[here])
    assert pot.held(heads)[0] != pot.held(heads)[1]


@pytest.mark.parametrize("reduce", [pytest.param("sum", marks=pytest.mark.slow), "max"])
def test_without_novelty_each_head_keeps_what_the_catalyst_attends_to(reduce):
    policy = dataclasses.replace(POT, alpha=0.0, reduce=reduce)
    heads, catalyst = random_heads(24), random_heads(2, seed=4)
    pot = Pot(policy)
    pot.read(heads, np.zeros(24))
    pot.distil(catalyst)
    assert "novelty" not in pot.cache.extra
    both = [
        rotate(jnp.concatenate(x, 1), *angles(jnp.arange(26)[None], SPEC.rope, 8))
        for x in ((heads.q, catalyst.q), (heads.k, catalyst.k))
    ]
    q, k = (np.asarray(x[0], np.float64) for x in both)
    for head, here in enumerate(pot.held(heads)):
        mass = []
        for p in (24, 25):
            logits = q[p, 2 * head : 2 * head + 2] @ k[: p + 1, head].T * 8**-0.5
            weights = np.exp(logits)
            mass.append((weights / weights.sum(1, keepdims=True)).sum(0)[:24])
        score = getattr(np, reduce)(mass, axis=0)
        score[:2] = np.inf
        assert here == sorted(np.argsort(-score)[:8].tolist())


def test_half_is_kept_for_novelty_and_the_rest_for_the_catalyst():
    heads, catalyst = random_heads(24), random_heads(2, seed=4)
    nll = np.random.default_rng(0).random(24)
    pots = {alpha: Pot(dataclasses.replace(POT, alpha=alpha)) for alpha in (0.0, 0.5)}
    for pot in pots.values():
        pot.read(heads, nll)
        pot.distil(catalyst)
    rank = nll.copy()
    rank[:2] = np.inf
    novel = set(np.argsort(-rank)[:4].tolist())
    attended = pots[0.0].held(heads)
    for half, only in zip(pots[0.5].held(heads), attended, strict=True):
        assert novel <= set(half)
        assert set(half) - novel <= set(only)  # the best of the others by attention


def novelty(session: Session) -> np.ndarray:
    """What every layer holds for row 0: [layers, kv heads, places]."""
    return np.stack([np.asarray(c.extra["novelty"][0]) for c in session.caches])


def test_novelty_is_the_loss_of_the_token_and_alone_keeps_the_least_expected():
    lm, text = tiny_lm(), tokens(1, 60)
    want = np.concatenate([[0], dense_nll(lm, text)[0]])
    held = Session(lm._engine, NOVEL, rows=1, length=60, chunk=8)
    held.read(text[:, :11].tolist())
    held.read(text[:, 11:24].tolist())
    for head in novelty(held).reshape(4, -1):
        np.testing.assert_allclose(head[:24], want[:24], atol=3e-5)
    held.read(text[:, 24:32].tolist())  # does not fit: distilled first
    survivors = np.sort(np.argsort(-want[:24])[:8])
    for head in novelty(held).reshape(4, -1):
        np.testing.assert_allclose(head[:8], want[survivors], atol=3e-5)
    held.read(text[:, 32:].tolist())
    for head in novelty(held).reshape(4, -1)[1:]:
        np.testing.assert_array_equal(head, novelty(held)[0, 0])
    for cache in held.caches:
        pos = np.asarray(cache.groups[0].pos[0, 0])
        assert pos.max() < NOVEL.budget and cache.groups[0].k.shape[2] == NOVEL.budget


@pytest.mark.slow
def test_a_text_that_fits_with_its_catalyst_is_read_exactly_and_not_distilled():
    lm, text = tiny_lm(), tokens(1, 26)
    held = Session(lm._engine, POT, rows=1, length=60, chunk=8)
    np.testing.assert_allclose(
        held.nll(text[:, :25]), dense_nll(lm, text[:, :25]), atol=3e-5
    )
    assert [c.extra["shift"].tolist() for c in held.caches] == [[0], [0]]
    held.read(text[:, 24:25].tolist())
    assert [c.extra["shift"].tolist() for c in held.caches] == [[16], [16]]
    assert [c.groups[0].pos.max() for c in held.caches] == [8, 8]


def test_losses_depend_on_where_cycles_fall_and_not_on_the_chunk():
    lm, text = tiny_lm(), tokens(1, 60)
    fours = lm.nll(text, cache=POT, chunk=4)
    np.testing.assert_allclose(lm.nll(text, cache=POT, chunk=8), fours, atol=5e-5)
    np.testing.assert_array_equal(lm.nll(text, cache=POT, chunk=4), fours)
    np.testing.assert_allclose(fours[:, :24], dense_nll(lm, text)[:, :24], atol=3e-5)
    assert np.abs(fours - dense_nll(lm, text))[:, 24:].max() > 0.1


@pytest.mark.slow
def test_decoding_past_a_full_pot_is_reading_one_token_at_a_time():
    lm, text = tiny_lm(), tokens(1, 8)[0].tolist()
    context = lm.prefill(text, cache=POT, chunk=8)
    asked = context.session.fork()
    asked.reserve(60)
    made = context.generate([3, 4], 30).tokens
    asked.read([[3, 4]])
    for token in made:
        assert int(np.argmax(lm_logits(lm, asked))) == token
        asked.read([[token]])
    assert len(made) == 30
    assert asked.caches[0].extra["shift"].tolist() == [16]
    assert asked.free.tolist() == [24 - 40 + 16]


def lm_logits(lm: LanguageModel, session: Session) -> np.ndarray:
    table = (
        lm.params["embed"]["table"] if lm.config.tied else lm.params["head"]["weight"]
    )
    return np.asarray(session.last @ table.T)[0]


@pytest.mark.slow
def test_a_saved_pot_goes_on_as_if_it_had_not_been(tmp_path):
    lm = tiny_lm()
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (5, 30)]
    context = lm.prefill(rows, cache=POT, chunk=8)
    context.save(tmp_path / "pot")
    loaded = lm.load_context(tmp_path / "pot")
    assert loaded.session.policy == POT
    assert loaded.session.free.tolist() == context.session.free.tolist() == [19, 10]
    want = [each.tokens for each in context.generate([3], 20)]
    assert [each.tokens for each in loaded.generate([3], 20)] == want


def test_bytes_are_those_of_the_pot_whatever_the_text():
    lm = tiny_lm()
    place = 2 * 2 * 8 * 4 + 4 + 2 * 4  # k and v, a position, novelty of two heads
    want = 2 * (26 * place + 4)
    assert lm.cache_bytes(POT, 10_000) == want
    held = Session(lm._engine, POT, rows=1, length=10_000, chunk=8)
    assert measured_bytes(held.caches) == want
    text = lm.cache_bytes("infinipot:budget=26,keep=8", 10_000)
    assert text == want  # its catalyst is text: no tokenizer is needed to plan


@pytest.mark.slow
def test_other_layers_forget_the_catalyst():
    layers = (
        LayerSpec(MambaSpec(32, 2), MlpSpec(16)),
        LayerSpec(dataclasses.replace(SPEC, window=6, sinks=2), MlpSpec(16)),
        LayerSpec(SPEC, MlpSpec(16)),
    )
    config = ModelConfig("llama", VOCAB, 32, find_runs(layers), 64)
    lm = LanguageModel(config, lively(init_params(config, jax.random.key(0))))
    text = tokens(1, 32).tolist()
    states = []
    for policy in (POT, policies.make("full")):
        held = Session(lm._engine, policy, rows=1, length=32, chunk=8)
        held.read(text)
        states.append(held.caches)
    assert states[0][2].extra["shift"].tolist() == [16]
    for got, want in zip(*(jax.tree.leaves(s[:2]) for s in states), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


class Letters:
    """A tokenizer of one token a letter."""

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [1] * bos + [ord(c) % VOCAB for c in text]


def test_a_catalyst_is_text_for_a_tokenizer_or_token_ids():
    made = policies.make('infinipot:budget=64,catalyst="What, then, is it?",alpha=0')
    assert (made.catalyst, made.alpha) == ("What, then, is it?", 0.0)
    assert len(made.encoded(Letters()).tokens) == len("What, then, is it?")
    ids = policies.make({"name": "infinipot", "budget": 64, "catalyst": [5, 6]})
    assert ids.encoded(Letters()) == ids.encoded(None) == ids
    assert ids.overflow.tokens == (5, 6) and ids.overflow.room == 64 - 32 - 2
    assert InfiniPot().encoded(Letters()).overflow.room == 2048 - len(CATALYST)
    assert InfiniPot(alpha=1.0).overflow.tokens == ()


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("infinipot:budget=1", "at least 2"),
        ("infinipot:keep=0", "at least 1"),
        ("infinipot:alpha=1.5", "0 to 1"),
        ("infinipot:reduce=mean", "use 'sum' or 'max'"),
        ("infinipot:keep=8,sinks=9", "below the 9 sinks"),
        ("infinipot:budget=8,keep=8", "no room"),
        ({"name": "infinipot", "budget": 8, "catalyst": [1, 2, 3, 4]}, "no room"),
        ({"name": "infinipot", "catalyst": []}, "catalyst is empty"),
        ({"name": "infinipot", "catalyst": [0.5]}, "text or a list of token ids"),
        ({"name": "infinipot", "catalyst": [VOCAB]}, "outside the vocabulary"),
        ('infinipot:catalyst="What', "quote is not closed"),
        ("infinipot", "no tokenizer; give token ids"),
    ],
)
def test_a_bad_pot_is_one_clear_error(policy, says):
    with pytest.raises(LclmError, match=says):
        tiny_lm().generate([1, 2], 1, cache=policy)


def test_angles_that_change_with_the_length_are_refused():
    lm = tiny_lm(rope=RopeSpec(kind="dynamic", factor=2.0, context=16))
    with pytest.raises(LclmError, match="dynamic"):
        lm.nll(tokens(1, 10), cache=POT)
