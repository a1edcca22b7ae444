"""Laws of rows and batches: packing, mixing, order, going on, processes."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lclm.config import from_dict
from lclm.data import pipeline
from lclm.data.batch import make_batch
from lclm.data.packing import PACKINGS, plan_rows
from lclm.data.pipeline import DataSpec, Part, Schedule, open_batches
from lclm.data.rows import InMemory, Packed
from lclm.errors import LclmError

STRIDE = 1000  # token = document * STRIDE + its index there


class Bytes:
    """The smallest tokenizer."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def documents(sizes) -> InMemory:
    return InMemory([np.arange(n) + i * STRIDE for i, n in enumerate(sizes)])


def batch_of(sizes, length, **options):
    plan = plan_rows(np.array(sizes, np.int64), length, **options)
    rows = Packed(documents(sizes), plan)
    keys = ("tokens", "segments", "mask")
    return make_batch(*(np.stack([r[k] for r in rows]) for k in keys)), plan


@pytest.fixture
def texts(tmp_path):
    """Two text files told apart by their letters."""
    found = {}
    for name, letters in (("low", "abcdefgh"), ("high", "ABCDEFGH")):
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(random.Random(name).choices(letters, k=800)))
        found[name] = f"local:path={path}"
    return found


def open_both(texts, *, seed=3, process=(0, 1), lengths=(), shares=(3, 1), batch=4):
    parts = tuple(
        Part(source, float(share))
        for source, share in zip(texts.values(), shares, strict=True)
    )
    spec = DataSpec(mixture=parts, lengths=lengths)
    return open_batches(
        spec, Bytes(), batch=batch, length=16, seed=seed, process=process
    )


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=12),
    length=st.integers(1, 24),
    packing=st.sampled_from(sorted(PACKINGS)),
    seed=st.integers(0, 3),
)
def test_every_token_but_a_documents_first_is_a_target_once(
    sizes, length, packing, seed
):
    if max(sizes) < 2:
        assert not len(plan_rows(np.array(sizes), length, packing=packing, seed=seed))
        return
    batch, plan = batch_of(sizes, length, packing=packing, seed=seed)
    counted = batch["weights"] > 0
    got = np.sort(batch["targets"][counted])
    want = [i * STRIDE + j for i, n in enumerate(sizes) for j in range(1, n)]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        batch["targets"][counted], batch["tokens"][counted] + 1
    )
    assert 0 < plan.fill <= 1


@pytest.mark.parametrize("packing", sorted(PACKINGS))
def test_positions_and_segments_follow_the_documents_of_a_row(packing):
    batch, _ = batch_of([5, 9, 3, 40, 2, 11], 16, packing=packing, seed=1)
    for tokens, segments, positions in zip(
        batch["tokens"], batch["segments"], batch["positions"], strict=True
    ):
        real = segments > 0
        assert not real[np.argmin(real) :].any() or real.all()  # padding is at the end
        assert (positions[~real] == -1).all()
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            assert len(set(tokens[own] // STRIDE)) == 1
            np.testing.assert_array_equal(positions[own], np.arange(own.sum()))


def test_best_fit_wastes_least_and_keeps_short_documents_whole():
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 40, 400)
    plans = {p: plan_rows(sizes, 64, packing=p, seed=0) for p in PACKINGS}
    assert plans["best_fit"].fill > 0.99
    assert plans["best_fit"].fill > plans["first_fit"].fill > 0.9
    for packing in ("best_fit", "first_fit"):
        assert len(plans[packing].doc) == len(sizes)
    assert len(plans["concat"].doc) > len(sizes)


def test_a_long_document_fills_whole_rows():
    plan = plan_rows(np.array([100, 5]), 16, packing="best_fit", seed=0)
    spans = [plan.spans(row) for row in range(len(plan))]
    assert sum(s == [(0, s[0][1], 17)] for s in spans) == 6


def test_cut_makes_documents_that_share_a_row_exactly():
    plan = plan_rows(np.array([64, 40]), 32, packing="best_fit", seed=0, cut=8)
    assert plan.count.max() == 8
    assert int(plan.count.sum()) == 104
    full = [row for row in range(len(plan)) if len(plan.spans(row)) == 4]
    assert len(full) == 3


def test_going_on_from_a_state_is_never_having_stopped(texts):
    whole = open_both(texts)
    want = [next(whole) for _ in range(30)]  # several epochs of the smaller part
    for stop in (0, 1, 13):
        first = open_both(texts)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        second = open_both(texts)
        next(second)
        second.set_state(state)
        assert second.get_state() == state
        for i in range(stop, stop + 6):
            same(next(second), want[i])


def test_the_rows_of_the_processes_make_the_batch_of_one(texts):
    whole = open_both(texts)
    parts = [open_both(texts, process=(i, 2)) for i in range(2)]
    for _ in range(4):
        want, got = next(whole), [next(p) for p in parts]
        same({k: np.concatenate([g[k] for g in got]) for k in want}, want)
    # A state of one process serves any number of them.
    whole.set_state(parts[1].get_state())
    same({k: v[:2] for k, v in next(whole).items()}, next(parts[0]))


def test_every_prefix_of_a_mixture_holds_its_shares(texts):
    stream = open_both(texts)
    low = 0
    for done in range(1, 20):
        tokens = next(stream)["tokens"]
        low += int((tokens[:, 0] >= ord("a")).sum())
        assert abs(low - 3 * done) <= 1


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(texts):
    spec = DataSpec(source=texts["low"])
    stream = open_batches(spec, Bytes(), batch=10, length=16, seed=0)
    epochs = [
        np.concatenate([next(stream)["weights"].sum(1) for _ in range(5)])
        for _ in range(2)
    ]
    assert sum(epochs[0]) == sum(epochs[1]) == 799
    assert (epochs[0] != epochs[1]).any()


def test_seeds_differ_and_repeat(texts):
    same(next(open_both(texts)), next(open_both(texts)))
    other = next(open_both(texts, seed=4))
    assert (other["tokens"] != next(open_both(texts))["tokens"]).any()


def test_rows_of_several_lengths_come_in_turn_and_go_on(texts):
    stream = open_both(texts, lengths=(4, 8, 8, 16))
    want = [next(stream) for _ in range(12)]
    lengths = [b["tokens"].shape[1] for b in want]
    for at in range(0, 12, 4):
        assert sorted(lengths[at : at + 4]) == [4, 8, 8, 16]
    stream.set_state({**stream.get_state(), "batch": 5})
    same(next(stream), want[5])


@given(
    lengths=st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
def test_a_schedule_skips_and_repeats_no_row(lengths, seed):
    schedule = Schedule(tuple(lengths), 4, seed)
    seen: dict[int, list[int]] = {}
    for step in range(3 * len(lengths)):
        length, first = schedule.at(step)
        seen.setdefault(length, []).append(first)
    for firsts in seen.values():
        assert firsts == list(range(0, 4 * len(firsts), 4))


def test_a_state_of_other_data_is_refused(texts):
    state = open_both(texts).get_state()
    for other in (dict(seed=4), dict(shares=(1, 1)), dict(batch=2), dict(lengths=(8,))):
        with pytest.raises(LclmError, match="other data"):
            open_both(texts, **other).set_state(state)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (dict(), "either source"),
        (dict(source="kjv", mixture=[dict(source="kjv")]), "either source"),
        (dict(mixture=[dict(source="kjv", share=0)]), "add up to zero"),
        (dict(mixture=[dict(source="kjv", share=-1)]), "at least 0"),
        (dict(mixture=[dict(source="kjv", share=float("nan"))]), "at least 0"),
        (dict(mixture=[dict(source="kjw")]), "did you mean 'kjv'"),
        (dict(mixture=[dict(source="kjv", shares=1)]), "did you mean 'share'"),
        (dict(mixture=[dict(source="kjv", shortest=9, longest=5)]), "none"),
        (dict(source="local:path=/nowhere/text"), "/nowhere/text"),
        (dict(source="local:file=x"), "not an option"),
        (dict(source="kjv", packing="bestfit"), "best_fit"),
        (dict(source="kjv", lengths=[0]), "at least 1"),
    ],
)
def test_a_mixture_that_cannot_be_is_one_error_before_anything_is_read(
    spec, said, monkeypatch
):
    def read(*_):
        raise AssertionError("something was read")

    monkeypatch.setattr(pipeline.sources, "read", read)
    with pytest.raises(LclmError, match=said):
        from_dict(DataSpec, spec)


def test_batches_that_do_not_split_or_fit_are_refused(texts):
    spec = DataSpec(source=texts["low"], lengths=(32,))
    with pytest.raises(LclmError, match="raise length"):
        open_batches(spec, Bytes(), batch=4, length=16, seed=0)
    with pytest.raises(LclmError, match="does not split"):
        open_batches(spec, Bytes(), batch=4, length=32, seed=0, process=(0, 3))
    part = Part(texts["low"], shortest=5000)
    with pytest.raises(LclmError, match="no row"):
        open_batches(DataSpec(mixture=(part,)), Bytes(), batch=4, length=16, seed=0)
