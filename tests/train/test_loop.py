"""Laws of the loop: what it records, and that it does not make a device wait."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lclm.errors import LclmError
from lclm.train.config import ModelSpec, train_config
from lclm.train.loop import Trainer
from lclm.train.profile import Profile
from lclm.train.records import Journal, read_journal
from lclm.train.stop import Stop
from tests.train.test_checkpoint import CONFIG, PARAMS, RUN, Counted, trainer


def test_no_logged_step_is_read_before_the_next_is_handed_over(tmp_path):
    made, order = trainer(), []
    step = made.step

    def watched(*args):
        order.append("step")
        return step(*args)

    made.step = watched
    made.fit(Counted(), tmp_path, lambda step, _: order.append(f"read {step}"))
    assert order[:4] == ["step", "step", "read 1", "step"]
    assert order[-2:] == ["read 5", "read 6"]


@pytest.mark.slow
def test_held_out_loss_is_that_of_the_model_as_it_will_be_used(tmp_path):
    model = ModelSpec("tiny", pattern="window:window=2")
    run = dataclasses.replace(
        RUN, model=model, eval_every=3, eval_batches=2, steps=3, holdout=RUN.data
    )
    made = Trainer(run, CONFIG, PARAMS)
    made.fit(Counted(), tmp_path, lambda *_: None, holdout=Counted())
    found = [r for r in read_journal(tmp_path / "metrics.jsonl") if "event" in r]
    events = [(r["event"], r["step"]) for r in found]
    assert events == [("start", 0), ("eval", 0), ("eval", 3)]
    plain = trainer()
    looks, sums = Counted(), np.zeros(2)
    for batch in (next(looks), next(looks)):
        batch = plain.place(batch)
        told, _ = plain.stepper.gradients(made.state.params, plain.frozen, batch)
        sums += [float(told["loss"] * told["weight"]), float(told["weight"])]
    assert found[2]["nll"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
    assert found[2]["tokens"] == sums[1] == found[1]["tokens"]


def test_a_run_whose_every_loss_is_not_finite_says_so(tmp_path):
    bad = jax.tree.map(lambda x: x * np.nan, PARAMS)
    made = Trainer(RUN, CONFIG, bad)
    made.step = trainer().step
    with pytest.raises(LclmError, match="all 6 steps"):
        made.fit(Counted(), tmp_path, lambda *_: None)
    lines = read_journal(tmp_path / "metrics.jsonl")
    assert lines[-1]["skipped"] == 6


def test_a_journal_is_cut_back_to_the_step_and_past_a_torn_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "loss": 1.0 / i} for i in (1, 2, 3, 4)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 5, "lo')
    journal = Journal(file, start=3)
    journal.write({"step": 4, "loss": 9.0})
    journal.close()
    assert read_journal(file) == [*rows[:3], {"step": 4, "loss": 9.0}]


def test_a_line_that_does_not_fit_on_the_disk_is_written_later(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    real = journal._file

    class Full:
        def write(self, data):
            if len(data) > 5:
                return real.write(data[:5])
            raise OSError(28, "No space left on device")

    journal._file = Full()
    journal.write({"step": 1})
    journal._file = real
    journal.write({"step": 2})
    journal.close()
    assert read_journal(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_chosen_steps_are_profiled(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda f: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    with Profile((2, 3), tmp_path) as profile:
        for step in (1, 2, 3, 4):
            profile.before(step)
            seen.append(step)
            profile.after(step, None)
    assert seen == [1, "start", 2, 3, "stop", 4]


def test_a_second_signal_does_not_wait_for_the_step():
    with Stop() as stop:
        stop._note(15, None)
        assert stop.asked == 15
        with pytest.raises(KeyboardInterrupt):
            stop._note(2, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(eval_every=5), "no holdout"),
        (dict(profile=(3,)), "first step, last step"),
        (dict(profile=(5, 2)), "first step, last step"),
        (dict(carry_optimizer=True), "without start_from"),
        (dict(name="a/b"), "cannot name a folder"),
        (dict(checkpoints=dict(every=-1)), "every is -1"),
        (dict(eval_batches=0), "eval_batches is 0"),
        (dict(checkpoint=dict(every=1)), "did you mean 'checkpoints'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, words):
    with pytest.raises(LclmError, match=words):
        train_config({**RUN.to_json(), **changes})
