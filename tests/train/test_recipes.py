"""Every recipe's config is a run, at both sizes, and takes a step on a tiny model."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.cli.config_file import read_config
from lclm.data.batch import make_batch
from lclm.models.decoder import init_params
from lclm.train.config import train_config
from lclm.train.loop import Trainer
from tests.tiny import tiny_config, tokens

CONFIGS = Path(__file__).parents[2] / "configs"
LENGTH = 64
RECIPES = {
    "longlora": ("", "plus=False"),
    "yarn_finetune": ("", "rope=linear", "rope=ntk", "rope=default,theta=8e6"),
    "prolong_stage1": ("",),
    "prolong_stage2": ("",),
    "prolong_sft": ("",),
    "longgen": ("", "hybrid=longgen_blocks", "hybrid=infini"),
    "duo_gates": ("",),
    "locret_heads": ("",),
    "learned_sink": ("", "sink=zero", "sink=learned", "sink=none"),
    "pretrain": ("",),
}
CASES = [(name, options) for name, all in RECIPES.items() for options in all]
SHOWN = {("longlora", ""), ("duo_gates", "")}


def recipe(name: str, *options: str):
    told = ",".join(o for o in ("data=kjv", *options) if o)
    return train_config(read_config(f"{CONFIGS / name}.py:{told}"))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_recipe_is_a_run_at_both_sizes(name, options):
    full, small = recipe(name, options), recipe(name, "size=cpu", options)
    assert full.steps > small.steps and full.length >= small.length
    assert full.objective.partition(":")[0] == small.objective.partition(":")[0]
    head = (CONFIGS / f"{name}.py").read_text().split('"""')[1]
    assert f"lclm train --config=configs/{name}.py" in head
    assert "ot measured yet" in head or "measured" in head


@pytest.mark.parametrize(
    ("name", "options"),
    [c if c in SHOWN else pytest.param(*c, marks=pytest.mark.slow) for c in CASES],
)
def test_a_recipe_takes_a_step_on_a_tiny_model(name, options):
    run = recipe(name, "size=cpu", options)
    run = dataclasses.replace(run, length=LENGTH, batch=2, accumulate=1, log_every=1)
    config = dataclasses.replace(tiny_config(windows=(None,) * 4), bos=96)
    made = Trainer(run, config, init_params(config, jax.random.key(0)))
    text = tokens(2, LENGTH + 1)
    mask = np.zeros_like(text)
    mask[:, LENGTH // 2 :] = 1
    batch = {k: jnp.asarray(v) for k, v in make_batch(text, mask=mask).items()}
    state, told = jax.jit(made.stepper.__call__)(made.state, made.frozen, batch)
    assert np.isfinite(told["loss"]) and int(state.skipped) == 0
    moved = [
        np.abs(np.asarray(leaf) - np.asarray(made.state.params[path])).max() > 0
        for path, leaf in state.params.items()
    ]
    assert any(moved)


def test_stage_two_begins_with_the_state_of_stage_one():
    one, two = recipe("prolong_stage1"), recipe("prolong_stage2")
    assert two.start_from == f"runs/{one.name}" and two.carry_optimizer
    assert (one.length, two.length) == (65536, 524288)
    assert (one.model.rope.theta, two.model.rope.theta) == (8e6, 1.28e8)
    assert one.batch * one.length == 2**22 and two.batch * two.length == 2**23


def test_gates_are_trained_at_the_papers_rates():
    from lclm.train.optim import make_schedule

    run = recipe("duo_gates")
    rate, N = make_schedule(run.optimizer, run.steps), run.steps
    for s in (0, 30, 100, 399, 400, 1000, 1599, 1700, 1999):
        want = min(1, max((s + 1) / (N / 5), 0.1), max((N - s) / (N / 5), 0.1))
        np.testing.assert_allclose(float(rate(s)), 0.02 * want, rtol=2e-2)
