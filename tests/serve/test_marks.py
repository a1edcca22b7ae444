"""Going back to a mark: one context answers many questions in place."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import cache as policies
from lclm.cache.base import measured_bytes
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.models.presets import preset
from lclm.serve import snapshot
from lclm.serve.calls import Engine
from lclm.serve.result import Stats
from lclm.serve.session import Session
from tests.contracts.test_cache import CACHED, make, some
from tests.tiny import tiny_config, tiny_lm, tokens


def opened(policy: str, length: int = 40) -> Session:
    engine = Engine(tiny_config(), {}, jnp.float32, jnp.float32)
    policy = policies.make(policy)
    return Session(engine, policy, rows=2, length=length, chunk=16)


def held_bytes() -> int:
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.parametrize("name", some([*CACHED, "snapkv:at=end"], "snapkv:at=end"))
def test_a_context_answers_in_place_what_copies_of_it_answer(name):
    name, _, end = name.partition(":")
    policy = policies.make("snapkv:budget=9,at=end") if end else make(name, 9)
    lm, rows = tiny_lm(), [tokens(1, n, seed=n)[0].tolist() for n in (20, 37)]
    context = lm.prefill(rows, cache=policy, chunk=16)
    questions = [[5, 6, 7], [8, 9, 10]]
    copies = [[a.tokens for a in context.generate(q, 6)] for q in questions]
    assert copies[0] != copies[1]
    mark, room = context.mark(), []
    for i in (0, 1, 0, 1):
        made = context.generate(questions[i], 6, keep=True)
        assert [answer.tokens for answer in made] == copies[i]
        assert context.session.start.tolist() > [20, 37]
        context.rollback(mark)
        room.append(held_bytes())
    assert room[0] == room[1] == room[3]
    assert [a.tokens for a in context.generate(questions[0], 6)] == copies[0]


def test_a_mark_of_a_cache_that_grows_holds_positions_and_of_others_a_copy():
    full, evicting = opened("full"), opened("h2o:budget=9")
    last = 2 * 32 * 4
    assert full.mark().nbytes == 2 * 2 * 40 * 4 + last
    assert evicting.mark().nbytes == measured_bytes(evicting.caches) + last
    coded = opened("quantised:residual=8,group=4", 400)
    assert coded.mark().nbytes < measured_bytes(coded.caches) / 4
    assert opened("quest", 400).mark().nbytes == 2 * 2 * 400 * 4 + last


def test_many_marks_leave_nothing_behind():
    session = opened("h2o:budget=9")
    first = session.mark()
    rooms = []
    for _ in range(3):
        session.mark()
        session.rollback(first)
        rooms.append(held_bytes())
    assert rooms[0] == rooms[2]


def test_an_older_mark_drops_the_younger_and_stays():
    session = opened("full")
    old, young = session.mark(), session.mark()
    session.rollback(young)
    session.rollback(old)
    newer = session.mark()
    with pytest.raises(LclmError, match="dropped when the context went back"):
        session.rollback(young)
    session.rollback(newer)
    session.rollback(old)


def test_a_mark_of_another_context_or_from_before_a_cut_is_refused():
    session = opened("full")
    mark = session.mark()
    for other in (opened("full"), session.fork()):
        with pytest.raises(LclmError, match="of another context"):
            other.rollback(mark)
    cut = opened("h2o:budget=9,at=end")
    early = cut.mark()
    cut.settle()
    with pytest.raises(LclmError, match="was cut behind it"):
        cut.rollback(early)


def test_a_context_that_grew_is_rolled_back_saved_and_loaded(tmp_path):
    session = opened("full")
    mark = session.mark()
    session.reserve(70)
    session.rollback(mark)
    assert session.length == 40
    assert {c.groups[0].k.shape[2] for c in session.caches} == {80}
    session.reserve(60)
    snapshot.save(tmp_path / "context", session, Stats(), False)
    again, _, _ = snapshot.load(tmp_path / "context", session.engine)
    for a, b in zip(*map(jax.tree.leaves, (again.caches, session.caches)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", ["full", "quest:budget=16,page=4,dense=0"])
def test_a_resumed_context_is_that_of_the_new_text(policy):
    lm = tiny_lm()
    first, second = tokens(1, 37, seed=1)[0].tolist(), tokens(1, 30, seed=2)[0].tolist()
    second = first[:13] + second[13:]
    fresh = lm.prefill(second, cache=policy, room=16).generate([5, 6], 6)
    context = lm.prefill(first, cache=policy, room=16)
    context.generate([7, 8], 6, keep=True)
    context.resume(second[13:], 13)
    assert context.stats.prompt_tokens == 17
    assert context.generate([5, 6], 6).tokens == fresh.tokens


@pytest.mark.parametrize(
    ("model", "policy", "why"),
    [
        ({}, "streaming:sinks=2,window=8", "the cache drops tokens"),
        ({}, "snapkv:budget=9,at=end", "the cache drops tokens"),
        ({"windows": (None, 8)}, "full", "layer 1 overwrites"),
    ],
)
def test_a_cache_that_does_not_hold_everything_is_not_resumed(model, policy, why):
    lm, ids = tiny_lm(**model), tokens(1, 37, seed=1)[0].tolist()
    assert not lm.resumes(policy)
    with pytest.raises(LclmError, match=why):
        lm.prefill(ids, cache=policy).resume([1], 20)


def test_a_recurrent_layer_is_not_resumed():
    lm = LanguageModel(preset("mini-bytes-mamba"), {"embed": {"table": jnp.ones(1)}})
    assert not lm.resumes("full") and tiny_lm().resumes("full")


def test_a_text_that_was_not_read_is_not_resumed():
    context = tiny_lm().prefill(tokens(1, 37, seed=1)[0].tolist())
    for at, more in ((0, [1]), (38, [1]), (20, [])):
        with pytest.raises(LclmError, match=f"behind {at} tokens: 1 to 37"):
            context.resume(more, at)
