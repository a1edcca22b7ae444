"""Facts outside the window, with an induction head and retaining heads that were trained.

Two layers of attention learn from scratch, in half a minute, to give the value that stood
behind a key somewhere in random filler; then Locret's heads learn from them which tokens
will be asked for.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.infini.needle import train
from lclm.cache import make
from lclm.config import AttentionSpec, LayerSpec, ModelConfig, RopeSpec, Run
from lclm.data.batch import make_batch
from lclm.language_model import LanguageModel
from lclm.learned import Extra, fingerprint, save_extra, shape
from lclm.models.decoder import unembed
from lclm.serve.session import Session
from lclm.train.config import train_config
from lclm.train.loop import Trainer

KEYS, VALUES, FILL = 4, 4, 8
LENGTH, BUDGET, SINKS, ROWS, STEPS = 96, 32, 4, 32, 300
LAYER = LayerSpec(AttentionSpec(4, 2, 16, RopeSpec(context=128)), None)
CONFIG = ModelConfig("learner", KEYS + VALUES + FILL, 64, (Run((LAYER,), 2),), 128)


def facts(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts [rows, LENGTH + KEYS] that end with every key, and their values.

    A key stands before its value, behind the sinks and so far back that neither of two
    layers with a window sees it from within the last BUDGET tokens.
    """
    texts = KEYS + VALUES + rng.integers(0, FILL, (rows, LENGTH + KEYS))
    pairs = np.tile(np.arange(SINKS // 2, LENGTH // 2 - BUDGET), (rows, 1))
    where = 2 * rng.permuted(pairs, axis=1)[:, :KEYS]
    values = KEYS + rng.integers(0, VALUES, (rows, KEYS))
    asked = rng.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)
    at = np.arange(rows)[:, None]
    texts[at, where], texts[at, where + 1] = np.arange(KEYS), values
    texts[:, LENGTH:] = asked
    return texts.astype(np.int32), values[at, asked].astype(np.int32)


@functools.cache
def model() -> LanguageModel:
    return train(CONFIG, facts, steps=2000, rate=5e-3, scale=True)


def heads(folder) -> str:
    """Retaining heads trained on what the questions look at."""
    run = train_config(
        dict(
            name="heads",
            model=dict(source="tiny"),
            data=dict(source="kjv"),
            steps=STEPS,
            batch=ROWS,
            length=LENGTH + KEYS,
            compute="float32",
            objective="locret_heads:hidden=32",
            optimizer=dict(lr=0.01, weight_decay=0.0, warmup=0),
        )
    )
    made, rng = Trainer(run, CONFIG, model().params), np.random.default_rng(1)
    state = made.state
    for _ in range(STEPS):
        text = np.pad(facts(rng, ROWS)[0], ((0, 0), (0, 1)))
        asks = np.zeros_like(text)
        asks[:, LENGTH : LENGTH + KEYS] = 1
        batch = make_batch(text, np.ones_like(text), asks)
        batch = {name: jnp.asarray(x) for name, x in batch.items()}
        state, _ = made.step(state, made.frozen, batch)
    own = {
        path.removeprefix("objective/"): np.asarray(x)
        for path, x in state.params.items()
    }
    base = fingerprint(model().params["embed"]["table"])
    extra = Extra("locret_heads", "learner", own, shape(CONFIG), {}, base)
    return str(save_extra(folder, extra))


def found(policy: str) -> float:
    """Share of values told when keys are asked one by one behind the text."""
    lm, (texts, values) = model(), facts(np.random.default_rng(99), 64)
    held = Session(
        lm._engine, make(policy), rows=len(texts), length=LENGTH + KEYS, chunk=16
    )
    held.read(texts[:, :LENGTH])
    right = []
    for asked, value in zip(texts[:, LENGTH:].T, values.T, strict=True):
        held.read(asked[:, None])
        logits = np.asarray(unembed(lm.config, lm.params, held.last))
        right.append(logits.argmax(-1) == value)
    return float(np.mean(right))


@pytest.mark.slow
def test_trained_models_hold_facts_where_streaming_guesses(tmp_path):
    near = found(f"streaming:sinks={SINKS},window={BUDGET - SINKS}")
    assert near < 0.4
    assert found("full") > 0.98
    assert found(f"quest:budget={BUDGET},page=4,dense=1") > 0.95
    kept = found(f"locret:budget={BUDGET},heads={heads(tmp_path)}")
    by_chance = found(f"locret:budget={BUDGET},heads=random")
    assert kept > 0.9
    assert by_chance < 0.6
