"""The policy protocol is complete: throwaway policies that use all of it."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from lclm.cache import write
from lclm.cache.base import Cache, Needs, Overflow
from lclm.cache.policies import Absolute, Full
from lclm.errors import LclmError
from lclm.serve.generate import Request
from lclm.serve.session import Engine, Session
from tests.tiny import dense_nll, tiny_lm, tokens


@dataclass(frozen=True)
class TopMass(Absolute):
    """Keep, per head, the tokens the last four queries attended to most."""

    budget: int = 8
    needs: ClassVar[Needs] = Needs(last=4)
    per_head: ClassVar[bool] = True

    @property
    def kept(self):
        return self.budget

    def capacity(self, layer, length):
        return self.budget

    def update(self, cache, new, step, layer, evidence):
        (kv,) = cache.groups
        scores = jnp.concatenate([evidence.mass_old, evidence.mass_new], 2)
        both = write.joined(kv, write.per_head(new))
        index = write.best(scores, both.pos, self.budget)
        return Cache((write.take(both, index),), cache.extra)


@dataclass(frozen=True)
class Catalyst(Absolute):
    """Fill up, then let two catalyst tokens choose which half stays."""

    budget: int = 8
    needs: ClassVar[Needs] = Needs(last=2)
    per_head: ClassVar[bool] = True
    overflow: ClassVar[Overflow] = Overflow(room=8, tokens=(5, 6))

    @property
    def kept(self):
        return self.budget + self.overflow.room + len(self.overflow.tokens)

    def capacity(self, layer, length):
        return self.budget + self.overflow.room

    def init(self, layer, batch, length, dtype):
        cache = super().init(layer, batch, length, dtype)
        score = jnp.zeros(cache.groups[0].k.shape[:3], jnp.float32)
        return Cache(cache.groups, {"score": score})

    def update(self, cache, new, step, layer, evidence):
        (kv,) = cache.groups
        both = write.joined(kv, write.per_head(new))
        index = write.best(jnp.zeros(both.pos.shape), both.pos, kv.k.shape[2])
        return Cache((write.take(both, index),), cache.extra)

    def weigh(self, cache, evidence, step):
        return Cache(cache.groups, {"score": evidence.mass_old})

    def compact(self, cache, layer):
        (kv,) = cache.groups
        score = cache.extra["score"]
        index = write.best(score, kv.pos, self.budget)
        spare = kv.k.shape[2] - self.budget
        index = jnp.pad(index, ((0, 0), (0, 0), (0, spare)), constant_values=-1)
        return Cache((write.take(kv, index),), cache.extra)


@dataclass(frozen=True)
class Sums(Full):
    """Full attention that adds up the losses it is told."""

    needs: ClassVar[Needs] = Needs(nll=True)

    def init(self, layer, batch, length, dtype):
        groups = super().init(layer, batch, length, dtype).groups
        return Cache(groups, {"sum": jnp.zeros(batch)})

    def observe(self, cache, nll, step_positions):
        told = jnp.sum(jnp.where(step_positions >= 0, nll, 0), 1)
        return Cache(cache.groups, {"sum": cache.extra["sum"] + told})


@dataclass(frozen=True)
class Gated(Full):
    """Full attention whose values are scaled by a parameter per layer."""

    needs: ClassVar[Needs] = Needs(params=True)

    def update(self, cache, new, step, layer, evidence):
        new = type(new)(new.k, new.v * step.policy[layer.index], new.pos)
        return super().update(cache, new, step, layer, evidence)


def test_a_scoring_policy_with_room_for_everything_is_exact():
    text = tokens(2, 30)
    got = tiny_lm().nll(text, cache=TopMass(budget=32), chunk=8)
    np.testing.assert_allclose(got, dense_nll(tiny_lm(), text), atol=3e-5)


def test_a_scoring_policy_keeps_the_tokens_its_last_queries_looked_at():
    lm = tiny_lm()
    held = Session(lm._engine, TopMass(budget=6), rows=1, length=16, chunk=16)
    whole = Session(lm._engine, TopMass(budget=16), rows=1, length=16, chunk=16)
    text = tokens(1, 16).tolist()
    held.read(text)
    whole.read(text)
    kv, all_kv = held.caches[0].groups[0], whole.caches[0].groups[0]
    assert (np.diff(np.asarray(kv.pos), axis=-1) > 0).all()
    for head in range(2):
        for slot, pos in enumerate(np.asarray(kv.pos[0, head])):
            np.testing.assert_allclose(
                kv.k[0, head, slot], all_kv.k[0, head, pos], atol=1e-6
            )


@pytest.mark.slow
def test_column_sums_of_all_keys_add_up_to_the_queries_they_came_from():
    seen = []

    @dataclass(frozen=True)
    class Spy(TopMass):
        def update(self, cache, new, step, layer, evidence):
            seen.append(evidence.mass_old.sum(-1) + evidence.mass_new.sum(-1))
            return super().update(cache, new, step, layer, evidence)

    from lclm.models.decoder import Decoder

    lm = tiny_lm()
    policy = Spy(budget=8)
    caches = tuple(policy.init(layer, 1, 8, jnp.float32) for layer in lm._engine.layers)
    Decoder(lm.config, policy).apply(
        {"params": lm.params},
        jnp.asarray(tokens(1, 8), jnp.int32),
        caches=caches,
        start=jnp.zeros(1, jnp.int32),
    )
    for sums in seen:
        np.testing.assert_allclose(sums, 4 * 2, rtol=1e-5)


def test_the_engine_runs_a_catalyst_rolls_it_back_and_compacts():
    lm, policy = tiny_lm(), Catalyst()
    held = Session(lm._engine, policy, rows=2, length=40, chunk=8)
    held.read(tokens(2, 24).tolist())
    assert held.start.tolist() == [24, 24]
    for cache in held.caches:
        pos = np.asarray(cache.groups[0].pos)
        assert ((pos >= 0).sum(-1) == policy.budget + 8).all()
        assert pos.max() == 23
        assert np.asarray(cache.extra["score"]).max() > 0


def test_a_catalyst_policy_that_never_overflows_is_exact():
    text = tokens(2, 17)
    got = tiny_lm().nll(text, cache=Catalyst(), chunk=8)
    np.testing.assert_allclose(got, dense_nll(tiny_lm(), text), atol=3e-5)


@pytest.mark.slow
def test_a_catalyst_policy_decodes_past_its_capacity():
    made = tiny_lm().generate(tokens(1, 20)[0].tolist(), 30, cache=Catalyst(), chunk=8)
    assert len(made.tokens) == 30


def test_each_token_read_or_made_is_told_with_its_loss_and_the_first_with_none():
    lm, text = tiny_lm(), tokens(2, 20)
    scored = Session(lm._engine, Sums(), rows=2, length=20, chunk=8)
    want = scored.nll(text)[:, :-1].sum(1)  # the last loss is of a token not yet read
    read = Session(lm._engine, Sums(), rows=2, length=20, chunk=8)
    read.read(text[:, :7].tolist())
    read.read(text[:, 7:19].tolist())
    for cache in (*scored.caches, *read.caches):
        np.testing.assert_allclose(cache.extra["sum"], want, rtol=1e-5)
    context = lm.prefill(text[0].tolist(), cache=Sums(), chunk=8)
    made = context._continue(Request(4), stream=False, single=True).tokens
    whole = np.concatenate([text[0], made])[None]
    for cache in context.session.caches:
        want = dense_nll(lm, whole).sum(1)
        np.testing.assert_allclose(cache.extra["sum"], want, rtol=1e-5)


def test_parameters_reach_a_policy_that_brings_them():
    lm = tiny_lm()
    text = tokens(1, 20)

    def nll(gates):
        engine = Engine(lm.config, lm.params, jnp.float32, jnp.float32, gates)
        return Session(engine, Gated(), rows=1, length=20, chunk=8).nll(text)

    one, two = jnp.float32(1), jnp.float32(2)
    np.testing.assert_allclose(nll((one, one)), lm.nll(text), atol=3e-5)
    assert np.abs(nll((one, two)) - lm.nll(text)).max() > 1e-3


@dataclass(frozen=True)
class Fetching(Gated):
    """Brings its gates by itself, for models of one width only."""

    width: int = 32
    ready: bool = False

    def resolve(self, config):
        if config.width != self.width:
            raise LclmError(f"gates for width {self.width}, not {config.width}")
        gates = tuple(np.float32(2 - i) for i in range(len(config.layers)))
        return dataclasses.replace(self, ready=True), gates


def test_a_policy_resolves_itself_against_the_model_and_brings_its_parameters():
    lm, text = tiny_lm(), tokens(1, 20)
    held = Session(lm._engine, Fetching(), rows=1, length=20, chunk=8)
    got = held.nll(text)
    assert held.policy.ready and lm._engine.policy_params is None
    np.testing.assert_array_equal(lm.nll(text, cache=Fetching(), chunk=8), got)
    engine = dataclasses.replace(lm._engine, policy_params=(2.0, 1.0))
    given = Session(engine, Gated(), rows=1, length=20, chunk=8).nll(text)
    np.testing.assert_allclose(given, got, atol=3e-5)
    with pytest.raises(LclmError, match="width 64, not 32"):
        lm.cache_bytes(Fetching(width=64), 20)
