"""Streaming is bounded: a million tokens through a cache of a few dozen."""

import functools

import jax
import numpy as np
import pytest

from lclm import cache as policies
from lclm.cache.base import measured_bytes
from lclm.config import ModelConfig, NormSpec, Run
from lclm.models.decoder import init_params
from lclm.ops.sampling import Sampler
from lclm.serve import session as serve
from lclm.serve.session import Engine, Session
from tests.contracts.test_mixers import FINAL, LAYERS, VOCAB, WIDTH
from tests.tiny import tiny_lm


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
    before, programs = measured_bytes(session.caches), serve._decode._cache_size()
    for _ in range(64):
        session.read(piece)
    decode()
    assert session.start[0] == (1 << 20) + 1024 + 8
    assert measured_bytes(session.caches) == before < 1 << 16
    assert serve._decode._cache_size() == programs
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(session.caches))
