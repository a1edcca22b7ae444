"""Laws of objectives with parameters of their own and a frozen model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import objectives
from lclm.blocks.attention import Attention, dense_attention
from lclm.cache.base import Heads
from lclm.cache.step import make_step
from lclm.cli.train import _keep_extra
from lclm.data.batch import make_batch
from lclm.errors import LclmError
from lclm.learned import Extra, fingerprint, load_extra, save_extra, shape
from lclm.models.decoder import init_params
from lclm.objectives.duo_gates import DuoProbe
from lclm.objectives.locret_heads import asking, received, roles
from lclm.train.config import train_config
from lclm.train.loop import Trained, Trainer
from lclm.train.step import Step
from tests.tiny import lively, tiny_config, tokens

CONFIG = tiny_config()
PARAMS = lively(init_params(CONFIG, jax.random.key(0)))
LENGTH = 24
DUO = "duo_gates:sinks=2,window=4"


def batch_of(rows: int = 2) -> dict:
    """Rows whose last third is the answer; the second row is two documents."""
    text = tokens(rows, LENGTH + 1)
    segments = np.ones_like(text)
    segments[1, 9:] = 2
    mask = np.zeros_like(text)
    mask[:, 17:] = 1
    mask[1, 6:9] = 1
    made = make_batch(text, segments, mask)
    return {k: jnp.asarray(v) for k, v in made.items()}


@functools.cache
def trainer(objective: str, scan: bool = True, accumulate: int = 1) -> Trainer:
    run = train_config(
        dict(
            name="own",
            model=dict(source="tiny"),
            data=dict(source="kjv"),
            steps=3,
            batch=2,
            length=LENGTH,
            compute="float32",
            objective=objective,
            scan=scan,
            accumulate=accumulate,
            optimizer=dict(lr=0.02, weight_decay=0.0, warmup=0),
        )
    )
    return Trainer(run, CONFIG, PARAMS)


def slopes(made: Trainer, own: dict, batch=None):
    stepper = made.stepper
    run = jax.jit(Step.gradients, static_argnums=0)
    return run(stepper, own, made.frozen, batch or batch_of())


def gates(value: float) -> dict:
    return {"objective/alpha": jnp.full((2, 2), value)}


@pytest.mark.slow
def test_open_gates_lose_nothing_and_feel_the_penalty_alone():
    told, grads = slopes(trainer(DUO), gates(1.0))
    assert float(told["distance"]) < 1e-14  # both halves of a product round alike
    np.testing.assert_allclose(grads["objective/alpha"], 0.05 / 4, rtol=1e-6)


@pytest.mark.parametrize("value", [pytest.param(0.0, marks=pytest.mark.slow), 0.4])
def test_a_window_over_everything_loses_nothing_at_any_gate(value):
    told, _ = slopes(trainer("duo_gates:sinks=2,window=24"), gates(value))
    assert float(told["distance"]) < 1e-9
    told, _ = slopes(trainer(DUO), gates(value))
    assert float(told["distance"]) > 1e-3


@pytest.mark.parametrize("scan", [True, False])
def test_the_slope_of_each_gate_is_that_of_finite_differences(scan):
    made = trainer(DUO, scan)
    alpha = jnp.asarray([[0.9, 0.3], [0.6, 0.5]])
    _, grads = slopes(made, {"objective/alpha": alpha})
    for at in [(0, 1), (1, 0)]:
        eps = 1e-2
        up, down = (
            slopes(made, {"objective/alpha": alpha.at[at].add(d)})[0]["loss"]
            for d in (eps, -eps)
        )
        want = (up - down) / (2 * eps)
        np.testing.assert_allclose(grads["objective/alpha"][at], want, rtol=0.03)


def test_a_closed_gate_is_sink_and_window_attention():
    spec = CONFIG.layers[0].mixer
    step = make_step(CONFIG, jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH)))
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, LENGTH, n, 8))
        for key, n in zip(keys, (4, 2, 2), strict=True)
    )
    probe = DuoProbe(2, 4)

    class Layer(Attention):
        gates: tuple = ()

        def get_variable(self, *_):
            return {"alpha": jnp.asarray(self.gates)}

    def run(q, alpha):
        layer = Layer(spec, 32, CONFIG.norm, gates=tuple(alpha))
        return probe(layer, Heads(q, k, v), step, None)

    half = jax.tree.map(lambda x: x[:1], step)
    near = dataclasses.replace(spec, sinks=2, window=5)
    local = dense_attention(Heads(q[1:], k[1:], v[1:]), half, near, None)
    full = dense_attention(Heads(q[:1], k[:1], v[:1]), half, spec, None)
    out = run(q, [0.0, 1.0])
    np.testing.assert_allclose(out[:1], full, atol=1e-6)
    np.testing.assert_allclose(out[1:, :, :2], local[:, :, :2], atol=1e-6)
    np.testing.assert_allclose(out[1:, :, 2:], full[:, :, 2:], atol=1e-6)
    slope = jax.grad(lambda q: jnp.sum(run(q, [0.3, 0.7]) ** 2))(q)
    assert np.abs(slope[:1]).max() == 0 and np.abs(slope[1:]).max() > 0


@pytest.mark.parametrize("name", [DUO, "locret_heads:hidden=16"])
def test_only_its_own_parameters_move_and_stay_in_range(name):
    made = trainer(name)
    frozen = {p: np.array(v) for p, v in made.frozen.items()}
    step, state = jax.jit(made.stepper.__call__), made.state
    began = {p: np.array(v) for p, v in state.params.items()}
    assert all(p.startswith("objective/") for p in began)
    losses = []
    for _ in range(3):
        state, told = step(state, made.frozen, batch_of())
        losses.append(float(told["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    for path, leaf in state.params.items():
        assert np.abs(leaf - began[path]).max() > 0
    for path, leaf in made.frozen.items():
        np.testing.assert_array_equal(leaf, frozen[path])
    if name == DUO:
        alpha = state.params["objective/alpha"]
        assert 0 <= alpha.min() and alpha.max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [DUO, "locret_heads:hidden=16"])
def test_any_split_of_a_batch_gives_the_same_slopes(name):
    made = trainer(name)
    moved = lively(made.state.params, 0.1)
    if name == DUO:
        moved = gates(0.5)
    told, want = slopes(made, moved)
    other, got = slopes(trainer(name, accumulate=2), moved)
    np.testing.assert_allclose(other["loss"], told["loss"], rtol=1e-5)
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-4, atol=1e-7)


def test_layers_without_full_attention_are_refused():
    objective = objectives.make(DUO)
    with pytest.raises(LclmError, match="window=4"):
        objective.check(tiny_config(windows=(None, 4)), LENGTH)


def test_targets_of_retaining_heads_are_the_largest_logits_from_answers():
    batch = batch_of()
    answer, prompt = map(np.asarray, roles(batch))
    keys = jax.random.split(jax.random.key(0), 2)
    q = jax.random.normal(keys[0], (2, LENGTH, 4, 8))
    k = jax.random.normal(keys[1], (2, LENGTH, 2, 8))
    segments = batch["segments"]
    got = np.asarray(received(q, k, jnp.asarray(answer), segments, 0.5))
    q, k = np.asarray(q), np.asarray(k)
    counted = 0
    for b, t in zip(*np.nonzero(prompt), strict=True):
        asks = [
            i
            for i in range(t, LENGTH)
            if answer[b, i] and segments[b, i] == segments[b, t]
        ]
        assert asks
        for head in range(2):
            mine = q[b, asks, 2 * head : 2 * head + 2] @ k[b, t, head]
            np.testing.assert_allclose(got[b, t, head], 0.5 * mine.max(), rtol=1e-4)
            counted += 1
    assert counted > 20
    assert answer[0].nonzero()[0].min() == 17 and not (answer & prompt).any()
    assert prompt[0, :17].all() and not prompt[0, 17:].any()


def test_the_query_that_predicts_an_answer_may_ask_too():
    batch = batch_of()
    answers = np.asarray(asking(batch, "answers"))
    predictors = np.asarray(asking(batch, "predictors"))
    np.testing.assert_array_equal(answers, roles(batch)[0])
    assert predictors[0].nonzero()[0].tolist() == [*range(16, LENGTH)]
    assert answers[0].nonzero()[0].tolist() == [*range(17, LENGTH)]
    with pytest.raises(LclmError, match="did you mean 'answers'"):
        objectives.make("locret_heads:asks=answer")


def test_what_was_trained_reads_back_with_its_base(tmp_path):
    own = {"alpha": np.linspace(0, 1, 4, dtype=np.float32).reshape(2, 2)}
    settings = {"sinks": 2, "window": 4}
    extra = Extra("duo_gates", "smollm2-135m", own, shape(CONFIG), settings)
    path = save_extra(tmp_path, extra)
    again = load_extra(tmp_path, kind="duo_gates")
    assert dataclasses.replace(again, params=own) == extra
    np.testing.assert_array_equal(again.params["alpha"], own["alpha"])
    with pytest.raises(LclmError, match="holds 'duo_gates', not 'locret_heads'"):
        load_extra(path, kind="locret_heads")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(LclmError, match="not a usable"):
        load_extra(path)
    with pytest.raises(LclmError, match="no such file"):
        load_extra(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "dtype"), [(DUO, "float32"), ("locret_heads:hidden=16", "float16")]
)
def test_a_finished_run_leaves_what_its_objective_trained(name, dtype, tmp_path):
    made = trainer(name)
    flat = made.frozen | made.state.params
    _keep_extra(made.run, made, Trained(flat, made.state, 0.0), tmp_path)
    found = load_extra(tmp_path, kind=name.partition(":")[0])
    assert found.base == "tiny" and found.model == shape(CONFIG)
    assert found.weights == fingerprint(flat["embed/table"])
    assert found.params
    for path, value in found.params.items():
        assert value.dtype == dtype
        want = np.asarray(made.state.params[f"objective/{path}"])
        np.testing.assert_allclose(value, want, atol=1e-3)
