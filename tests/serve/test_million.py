"""Streaming is bounded: a million tokens through a cache of a few dozen."""

import jax
import numpy as np
import pytest

from lclm import cache as policies
from lclm.cache.base import measured_bytes
from lclm.serve.session import Session
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
