"""Facts outside the window, with an induction model, heads and gates that were trained.

Two layers of attention learn from scratch, in half a minute, to give the value that
stood behind a key somewhere in random filler; then Locret's heads learn from them which
tokens will be asked for, and DuoAttention's gates which heads look so far back.
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


def learned(folder, objective: str, rate: float) -> tuple[str, dict[str, np.ndarray]]:
    """What an objective trains where keys are asked for: its file and its numbers."""
    run = train_config(
        dict(
            name="extra",
            model=dict(source="tiny"),
            data=dict(source="kjv"),
            steps=STEPS,
            batch=ROWS,
            length=LENGTH + KEYS,
            compute="float32",
            objective=objective,
            optimizer=dict(lr=rate, weight_decay=0.0, warmup=0),
        )
    )
    made, rng = Trainer(run, CONFIG, model().params), np.random.default_rng(1)
    state = made.state
    for _ in range(STEPS):
        text = np.pad(facts(rng, ROWS)[0], ((0, 0), (0, 1)))
        told = np.zeros_like(text)
        told[:, LENGTH + 1 :] = 1  # the tokens behind the keys
        batch = make_batch(text, np.ones_like(text), told)
        batch = {name: jnp.asarray(x) for name, x in batch.items()}
        state, _ = made.step(state, made.frozen, batch)
    own = {
        path.removeprefix("objective/"): np.asarray(x)
        for path, x in state.params.items()
    }
    base, kind = fingerprint(model().params["embed"]["table"]), objective.split(":")[0]
    extra = Extra(kind, "learner", own, shape(CONFIG), {}, base)
    return str(save_extra(folder, extra)), own


def found(policy: str | dict) -> float:
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
def test_quest_and_trained_heads_hold_facts_where_streaming_guesses(tmp_path):
    near = found(f"streaming:sinks={SINKS},window={BUDGET - SINKS}")
    assert near < 0.4
    assert found("full") > 0.98
    asked = found(f"quest:budget={BUDGET},page=4,dense=1")
    assert asked > 0.95
    assert asked >= max(found(f"{name}:budget={BUDGET}") for name in ("h2o", "tova"))
    heads, _ = learned(tmp_path, "locret_heads:hidden=32,asks=predictors", 0.01)
    assert found(f"locret:budget={BUDGET},heads={heads}") > 0.9
    assert found(f"locret:budget={BUDGET},heads=random") < 0.6


@pytest.mark.slow
def test_trained_gates_pick_the_heads_that_look_back(tmp_path):
    sizes = {"sinks": SINKS, "window": BUDGET - SINKS}
    near = ",".join(f"{name}={size}" for name, size in sizes.items())
    gates, own = learned(tmp_path, f"duo_gates:{near},penalty=0.05", 0.02)
    assert found(f"duo:{near},sparsity=0.75,gates={gates}") > 0.9
    last = own["alpha"] == own["alpha"].max()
    full = tuple(tuple(bool(x) for x in layer) for layer in ~last)
    assert found({"name": "duo", "heads": full, **sizes}) < 0.6
