"""Laws every cache policy keeps, over every entry of the table."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import cache as policies
from lclm.blocks.layer import init_states, state_bytes
from lclm.cache.base import measured_bytes
from lclm.cache.evict import Evicting
from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    RopeSpec,
    Run,
    find_runs,
)
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.models.decoder import init_params
from lclm.serve.session import Session
from lclm.specs import MambaSpec
from tests.tiny import dense_nll, lively, tiny_config, tiny_lm, tokens

LENGTH = 40
CACHED = [n for n in policies.POLICIES if not policies.POLICIES[n].recompute]
CHOOSING = [n for n in CACHED if issubclass(policies.POLICIES[n], Evicting)]
STEADY = [n for n in CACHED if not policies.POLICIES[n].compacts]
# What a policy needs beside its size to run over the tiny model.
GIVEN = {
    "duo": {"sinks": 2, "heads": ((True, False), (False, True))},
    "locret": {"heads": "random"},
    "infinipot": {"catalyst": (5,)},
    "quest": {"page": 1, "dense": 1},
}
# Policies with a way of their own to keep tokens.
OWN = (
    "full",
    "streaming",
    "h2o",
    "pyramidkv",
    "duo",
    "quest",
    "infinipot",
    "quantised",
)
# Of the policies over models of other kinds, those that `make test` runs.
QUICK = [("jamba", "streaming"), ("longgen", "h2o")]
# Policies whose size may be given in bytes.
SIZED = [n for n in policies.POLICIES if policies.POLICIES[n].sizing]
# Slots as codes: a few policies stand for all of them.
CODED = [
    "h2o:bits=4,beta=4",
    "quantised:residual=8,group=4",
    "quest:bits=4",
    "infinipot:bits=4",
]


def some(names: list[str], *quick: str) -> list:
    """All names; those beside `quick` only among the slow tests."""
    slow = pytest.mark.slow
    return [n if n in quick else pytest.param(n, marks=slow) for n in names]


def make(name: str, budget: int) -> policies.CachePolicy:
    """The policy with its sizes set to about `budget` tokens, and `name`'s options."""
    name, _, text = name.partition(":")
    cls = policies.POLICIES[name]
    sizes = {"window", "budget"} & {f.name for f in dataclasses.fields(cls)}
    options = {k: int(v) for k, v in (x.split("=") for x in text.split(",") if x)}
    return cls(**dict.fromkeys(sizes, budget), **GIVEN.get(name, {}) | options)


def session(name: str, budget: int, rows: int = 1, chunk: int = 16) -> Session:
    return Session(
        tiny_lm()._engine, make(name, budget), rows=rows, length=LENGTH, chunk=chunk
    )


def stored(session: Session) -> list[list[int]]:
    """Sorted positions held by each layer of row 0."""
    return [
        sorted(p for g in c.groups for p in np.asarray(g.pos[0, 0]).tolist() if p >= 0)
        for c in session.caches
    ]


@pytest.mark.parametrize("name", some(list(policies.POLICIES), "recompute", *OWN))
def test_a_budget_of_the_whole_text_equals_full_attention(name):
    text = tokens(2, LENGTH)
    nll = tiny_lm().nll(text, cache=make(name, LENGTH), chunk=16)
    np.testing.assert_allclose(nll, dense_nll(tiny_lm(), text), atol=3e-5)


def hybrid(kind: str) -> ModelConfig:
    """Layers of other kinds beside attention, or attention of several kinds."""
    full, mlp = AttentionSpec(4, 2, 8, RopeSpec(context=64)), MlpSpec(48)
    window, sparse, sinks = (
        dataclasses.replace(full, **change)
        for change in (
            {"window": 6},
            {"pattern": "block_sparse:block=4,local=2,stride=3,kv_heads=2"},
            {"window": 6, "sinks": 3},
        )
    )
    mixers = {
        "jamba": (MambaSpec(48, 2), full, MambaSpec(48, 2), full),
        "longgen": (sinks, full, sparse, full),
        "gemma": (window, window, full, full),
    }[kind]
    layers = tuple(LayerSpec(mixer, mlp) for mixer in mixers)
    return ModelConfig(kind, 97, 32, find_runs(layers), 64)


@functools.cache
def hybrid_lm(kind: str) -> LanguageModel:
    config = hybrid(kind)
    return LanguageModel(config, lively(init_params(config, jax.random.key(0))))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[pytest.mark.slow] * ((kind, name) not in QUICK))
        for kind in ("jamba", "longgen", "gemma")
        for name in CACHED
    ],
)
def test_every_policy_runs_over_every_kind_of_model(kind, name):
    """The whole text kept: as under "full"; less kept: less is allocated."""
    lm, text = hybrid_lm(kind), tokens(2, LENGTH)
    full = lm.nll(text, cache="full", chunk=16)
    whole, small = make(name, LENGTH), make(name, 9)
    if name == "duo":
        whole, small = (
            dataclasses.replace(x, heads=(), gates="random") for x in (whole, small)
        )
    nll = lm.nll(text, cache=whole, chunk=16)
    np.testing.assert_allclose(nll, full, atol=3e-5)
    assert np.isfinite(lm.nll(text, cache=small, chunk=16)).all()
    if small.kept is not None:
        assert lm.cache_bytes(small, LENGTH) < lm.cache_bytes("full", LENGTH)
    (made,) = lm.generate(text[:1].tolist(), 4, cache=small, chunk=16)
    assert len(made.tokens) == 4


@pytest.mark.parametrize("name", ["h2o", "streaming", "quest", "duo", "locret"])
def test_a_model_without_attention_has_nothing_to_keep_or_drop(name):
    layer = LayerSpec(MambaSpec(48, 2), None)
    config = ModelConfig("mamba", 97, 32, (Run((layer,), 2),), 64)
    lm = LanguageModel(config, init_params(config, jax.random.key(0)))
    asked = make(name, 9)
    with pytest.raises(LclmError, match=r"no attention layer.*use 'full'"):
        lm.nll(tokens(1, 20), cache=asked)
    with pytest.raises(LclmError, match=r"no attention layer.*use 'full'"):
        lm.cache_bytes(asked, 20)


def test_codes_of_a_whole_text_are_near_full_attention():
    text = tokens(2, LENGTH)
    nll = tiny_lm().nll(text, cache=make("full:bits=8", LENGTH), chunk=16)
    near = np.abs(nll - dense_nll(tiny_lm(), text))
    assert 0 < np.mean(near) < 0.05


@pytest.mark.parametrize("name", some([*STEADY, "quest:bits=4,dense=0"], "streaming"))
def test_losses_do_not_depend_on_the_chunk(name):
    text = tokens(1, LENGTH)
    whole = tiny_lm().nll(text, cache=make(name, 9), chunk=LENGTH)
    for chunk in (1, 16):
        split = tiny_lm().nll(text, cache=make(name, 9), chunk=chunk)
        np.testing.assert_allclose(split, whole, atol=3e-5)


@pytest.mark.parametrize("name", some([*CACHED, *CODED, "full:bits=8"], *OWN))
def test_a_donated_cache_has_the_bytes_of_the_formula_and_stays_in_budget(name):
    lm, policy = tiny_lm(), make(name, 9)
    held = session(name, 9, rows=3)
    want = state_bytes(lm.config, policy, 3, LENGTH, np.float32)
    assert measured_bytes(held.caches) == want
    before = jax.tree.leaves([cache.groups for cache in held.caches])
    held.read(tokens(3, LENGTH).tolist())
    assert measured_bytes(held.caches) == want
    assert all(leaf.is_deleted() for leaf in before if leaf.size)
    if policy.kept is not None:
        slots = [sum(g.k.shape[2] for g in cache.groups) for cache in held.caches]
        assert np.mean(slots) <= policy.kept


@pytest.mark.parametrize("name", [*SIZED, "h2o:bits=4", "pyramidkv:at=end"])
def test_a_size_in_bytes_is_the_most_tokens_that_take_no_more(name):
    name, _, text = name.partition(":")
    options = GIVEN.get(name, {}) | dict(x.split("=") for x in text.split(",") if x)
    size, config = policies.POLICIES[name].sizing, tiny_config()
    length = LENGTH if name == "duo" else 10 * LENGTH
    asked = policies.make({"name": name, size: "8KB", **options})
    held = asked.fitted(config, np.float32, length)
    more = dataclasses.replace(held, **{size: getattr(held, size) + 1})
    if held.settles:
        held, more = held.settled(length), more.settled(length)
    caches = init_states(config, held, 1, length, np.float32)
    assert measured_bytes(caches) <= 8000
    assert state_bytes(config, more, 1, length, np.float32) > 8000


def seen(session: Session) -> list[np.ndarray]:
    """All that a session holds and later calls can notice."""
    found = [session.start, session.free, session.last, session.length]
    for cache, layer in zip(session.caches, session.engine.layers, strict=True):
        for kv in cache.groups:
            found.append(kv.pos)
            for x in jax.tree.leaves((kv.k, kv.v)):
                every = max(1, kv.k.shape[2] // max(1, x.shape[2]))
                found.append(jnp.where(kv.pos[:, :, ::every, None] >= 0, x, 0))
        lasting = session.policy.over(layer).lasting(layer)
        found += [cache.extra[name] for name in sorted({*cache.extra} - {*lasting})]
    return [np.asarray(x) for x in found if x is not None]


@pytest.mark.parametrize("name", some([*CACHED, *CODED], *OWN))
def test_a_rollback_brings_back_what_was_there_bit_for_bit(name):
    held, text = session(name, 9, rows=3), tokens(3, 3 * 16)
    held.read([row[:n] for row, n in zip(text.tolist(), (16, 9, 3), strict=True)])
    mark, before = held.mark(), seen(held)
    after = []
    for part in (text[:, 16:32], text[:, 32:], text[:, 16:32]):
        held.read(part.tolist())
        after.append(seen(held))
        held.rollback(mark)
        for now, then in zip(seen(held), before, strict=True):
            np.testing.assert_array_equal(now, then)
    for first, again in zip(after[0], after[2], strict=True):
        np.testing.assert_array_equal(first, again)
    assert any((a != b).any() for a, b in zip(after[0], after[1], strict=True))


@pytest.mark.parametrize("name", some(STEADY, "streaming"))
def test_chunked_reading_stores_what_token_by_token_reading_stores(name):
    text = tokens(1, LENGTH).tolist()
    chunked, single = session(name, 9), session(name, 9, chunk=1)
    chunked.read(text)
    single.read(text)
    assert stored(chunked) == stored(single)
    for a, b in zip(stored(chunked), stored(single), strict=True):
        assert a == b
        assert a[-1] == LENGTH - 1


@pytest.mark.parametrize("name", some(CACHED + CODED, "snapkv"))
def test_rows_of_a_ragged_batch_are_independent(name):
    lm, policy = tiny_lm(), make(name, 9)
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (3, 20, 37)]
    together = lm.generate(rows, 6, cache=policy, chunk=16)
    for row, result in zip(rows, together, strict=True):
        assert lm.generate(row, 6, cache=policy, chunk=16).tokens == result.tokens


@pytest.mark.parametrize("name", some(CACHED, "full", "h2o"))
def test_a_second_text_is_untouched_by_the_first_and_compiles_nothing(name):
    from lclm.serve import calls

    lm, text = tiny_lm(), tokens(2, 20)
    first = lm.generate(text[:1].tolist(), 4, cache=make(name, 9), chunk=16)[0].tokens
    compiled = calls.decode._cache_size(), calls.read_last._cache_size()
    lm.generate(text[1:].tolist(), 4, cache=make(name, 9), chunk=16)
    again = lm.generate(text[:1].tolist(), 4, cache=make(name, 9), chunk=16)[0].tokens
    assert again == first
    assert compiled == (calls.decode._cache_size(), calls.read_last._cache_size())


@pytest.mark.parametrize("name", [*CHOOSING, "locret:beta=4", "h2o:bits=4,beta=4"])
def test_a_chosen_cache_is_full_sorted_and_holds_what_it_protects(name):
    held = session(name, 9, rows=3)
    held.read(
        [row[:n] for row, n in zip(tokens(3, 40).tolist(), (40, 23, 9), strict=True)]
    )
    policy, layers = held.policy, held.engine.layers
    for cache, layer in zip(held.caches, layers, strict=True):
        for group in cache.groups:
            for pos, length in zip(np.asarray(group.pos), (40, 23, 9), strict=True):
                for head in pos:
                    found = head[head >= 0].tolist()
                    assert found == sorted(set(found))
                    assert len(found) == min(policy.share(layer, LENGTH), length)
                    recent = range(length - policy.protected_recent, length)
                    assert {*range(policy.sinks), *recent} <= set(found)


@pytest.mark.parametrize("name", some(CHOOSING, "h2o"))
def test_a_prompt_is_cut_once_and_what_follows_is_kept(name):
    lm = tiny_lm()
    policy = dataclasses.replace(make(name, 9), at="end")
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (20, 37)]
    context = lm.prefill(rows, cache=policy, chunk=16)
    cut = [cache.groups[0].pos for cache in context.session.caches]
    for pos, layer in zip(cut, lm._engine.layers, strict=True):
        held = (np.asarray(pos) >= 0).sum(-1)
        assert (held == policy.share(layer, 37)).all()
    made = context.generate([5, 6, 7], 4)
    assert [len(each.tokens) for each in made] == [4, 4]
    want = [c.groups[0].k.nbytes for c in context.session.caches]
    assert max(want) < lm.cache_bytes("full", 37, batch=2) / 4


@pytest.mark.parametrize("name", some(CHOOSING, "snapkv"))
def test_a_prompt_within_the_budget_is_not_cut(name):
    lm, row = tiny_lm(), tokens(1, 20)[0].tolist()
    policy = dataclasses.replace(make(name, LENGTH), at="end")
    full = lm.generate(row, 6, chunk=16).tokens
    assert lm.generate(row, 6, cache=policy, chunk=16).tokens == full
