"""Laws of one training step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.data.batch import make_batch
from lclm.errors import LclmError
from lclm.models.decoder import init_params
from lclm.train.config import TrainConfig, train_config
from lclm.train.loop import Trainer
from tests.tiny import lively, tiny_config, tokens

CONFIG = tiny_config()
PARAMS = lively(init_params(CONFIG, jax.random.key(0)))
RUN = train_config(
    dict(
        name="tiny",
        model=dict(source="tiny"),
        data=dict(source="kjv"),
        steps=4,
        batch=4,
        length=16,
        compute="float32",
        optimizer=dict(lr=1e-2),
    )
)


def packed(rows: int = 4, length: int = 16) -> dict:
    """Rows of two documents and some padding, unlike in every row."""
    segments = np.ones((rows, length + 1), np.int32)
    for i in range(rows):
        segments[i, 3 + i :] = 2
        segments[i, length - i :] = 0
    return make_batch(tokens(rows, length + 1), segments)


@functools.cache
def trainer(**changes) -> Trainer:
    return Trainer(dataclasses.replace(RUN, **changes), CONFIG, PARAMS)


def gradients(made: Trainer, batch):
    step = made.stepper
    return jax.jit(step.gradients)(made.state.params, made.frozen, batch)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_split_of_a_batch_gives_the_gradients_of_the_whole(parts):
    batch = packed()
    told, want = gradients(trainer(), batch)
    other, got = gradients(trainer(accumulate=parts), batch)
    np.testing.assert_allclose(other["loss"], told["loss"], rtol=1e-6)
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-5, atol=1e-6)


def test_a_masked_part_of_a_batch_is_no_nan():
    batch = packed()
    batch["weights"][:2] = 0
    told, grads = gradients(trainer(accumulate=2), batch)
    assert np.isfinite(told["loss"])
    assert all(np.isfinite(g).all() for g in grads.values())


def test_a_loss_that_is_not_finite_changes_nothing():
    made = trainer()
    bad = {**made.state.params}
    bad["final_norm/scale"] = jnp.full_like(bad["final_norm/scale"], jnp.nan)
    state = dataclasses.replace(made.state, params=bad)
    after, told = jax.jit(made.stepper.__call__)(state, made.frozen, packed())
    assert int(after.skipped) == 1 and int(after.step) == 1
    assert not np.isfinite(told["loss"])
    for path, leaf in state.params.items():
        np.testing.assert_array_equal(after.params[path], leaf)


def test_only_trained_parameters_have_optimizer_state():
    model = dataclasses.replace(RUN.model, trains=(r"norm",))
    made = Trainer(dataclasses.replace(RUN, model=model), CONFIG, PARAMS)
    held = sum(x.size for x in jax.tree.leaves(made.state.opt) if x.ndim)
    assert held == 2 * sum(v.size for v in made.state.params.values())
    assert all("norm" in path for path in made.state.params)
    assert not set(made.state.params) & set(made.frozen)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("batch", 0, "batch is 0"),
        ("accumulate", 3, "does not split"),
        ("compute", "float8", "float8"),
        ("steps", -1, "steps is -1"),
    ],
)
def test_a_run_that_cannot_be_is_refused(field, value, words):
    with pytest.raises(LclmError, match=words):
        train_config({**RUN.to_json(), field: value})


def test_a_run_reads_back_from_its_own_json():
    assert train_config(RUN.to_json()) == RUN
    with pytest.raises(LclmError, match="lenght"):
        train_config({**RUN.to_json(), "lenght": 3})
    assert isinstance(RUN, TrainConfig)
