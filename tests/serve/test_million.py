"""A million tokens pass through caches and states of a few hundred, by any policy."""

import dataclasses
import functools
import gc

import jax
import numpy as np
import pytest

from lclm import cache as policies
from lclm.cache.base import measured_bytes
from lclm.config import (
    AttentionSpec,
    LayerSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
    Run,
)
from lclm.models.decoder import init_params
from lclm.ops.sampling import Sampler
from lclm.serve import calls as serve
from lclm.serve.session import Engine, Session
from tests.contracts.test_mixers import FINAL, LAYERS, VOCAB, WIDTH
from tests.tiny import lively, tiny_lm

BUDGET, CHUNK, MILLION = 256, 1024, 1 << 20
# Options by which a policy is bounded over a model of one layer with one kv head.
GIVEN = {
    "streaming": {"window": BUDGET - 4},
    "duo": {"sinks": 4, "window": BUDGET - 4, "heads": ((False,),)},
    "locret": {"heads": "random"},
    "infinipot": {"budget": CHUNK + BUDGET, "keep": BUDGET - 8, "catalyst": (5, 6)},
}
UNBOUNDED = {"full", "quest", "quantised", "recompute"}
BOUNDED = [{"name": name} for name in policies.POLICIES if name not in UNBOUNDED]
CODED = [{"name": name, "bits": 4} for name in ("h2o", "expected_attention")]


def bounded(name: str, **options) -> policies.CachePolicy:
    cls = policies.POLICIES[name]
    fields = {"window", "budget"} & {field.name for field in dataclasses.fields(cls)}
    sizes = dict.fromkeys(fields, BUDGET)
    return cls(**sizes | GIVEN.get(name, {}) | options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", BOUNDED + CODED, ids=lambda g: "-".join(map(str, g.values()))
)
def test_a_million_tokens_pass_through_every_bounded_policy(given):
    spec = AttentionSpec(2, 1, 8, RopeSpec(context=64))
    config = ModelConfig("test", 97, 16, (Run((LayerSpec(spec, None),), 1),), 64)
    params = lively(init_params(config, jax.random.key(0)))
    engine = Engine(config, params, np.float32, np.float32)
    held = Session(engine, bounded(**given), rows=1, length=MILLION, chunk=CHUNK)
    decode = functools.partial(
        held.decode, np.ones(1, bool), jax.random.split(jax.random.key(0), 1),
        sampler=Sampler(), limit=4, steps=4, eos=(),
    )  # fmt: skip
    piece = np.random.default_rng(0).integers(0, 97, (1, CHUNK))

    def now() -> tuple[int, int, list[int]]:
        gc.collect()
        programs = [serve.read_last, serve.decode, serve.overflow]
        return (
            measured_bytes(held.caches),
            sum(array.nbytes for array in jax.live_arrays()),
            [program._cache_size() for program in programs],
        )

    for _ in range(3):
        held.read(piece)
    decode()
    before = now()
    while held.start[0] < MILLION:
        held.read(piece)
        assert held.last.is_ready()  # calls that run ahead hold memory at once
    decode()
    assert now() == before
    assert before[0] < 1 << 20  # a byte a token; keys and values take 64
    assert held.policy.kept is not None
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(held.caches))


@pytest.mark.slow
def test_a_million_tokens_stream_in_constant_memory():
    policy = policies.make("streaming:sinks=4,window=60")
    session = Session(tiny_lm()._engine, policy, rows=1, length=1 << 20, chunk=8192)
    before = measured_bytes(session.caches)
    piece = np.random.default_rng(0).integers(0, 97, (1, 8192))
    live = []
    for _ in range(128):
        session.read(piece)
        live.append(sum(a.nbytes for a in jax.live_arrays()))
    assert session.start[0] == 1 << 20
    assert measured_bytes(session.caches) == before
    assert live[-1] == live[0]
    first = tiny_lm().nll(piece[:, :4000], cache=policy, chunk=512)[0, -1000:].mean()
    again = session.nll(np.concatenate([piece, piece[:, :1]], 1))[0, 2999:3999].mean()
    # The same text after a million tokens costs what it cost at the start.
    assert abs(first - again) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "mamba2", "megalodon", "infini-delta"])
def test_a_recurrent_state_has_one_size_and_one_program_at_any_length(name):
    layer, norm = LAYERS[name], FINAL.get(name, NormSpec())
    config = ModelConfig("test", VOCAB, WIDTH, (Run((layer,), 1),), 64, norm)
    engine = Engine(
        config, init_params(config, jax.random.key(0)), np.float32, np.float32
    )
    session = Session(
        engine, policies.make("full"), rows=1, length=1 << 20, chunk=16384
    )
    piece = np.random.default_rng(0).integers(0, VOCAB, (1, 16384))
    decode = functools.partial(
        session.decode, np.ones(1, bool), jax.random.split(jax.random.key(0), 1),
        sampler=Sampler(), limit=4, steps=4, eos=(),
    )  # fmt: skip
    session.read(piece[:, :1024])
    decode()
    before, programs = measured_bytes(session.caches), serve.decode._cache_size()
    for _ in range(64):
        session.read(piece)
    decode()
    assert session.start[0] == (1 << 20) + 1024 + 8
    assert measured_bytes(session.caches) == before < 1 << 16
    assert serve.decode._cache_size() == programs
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(session.caches))
