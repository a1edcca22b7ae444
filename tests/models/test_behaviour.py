"""What the memories are for: tiny models trained in seconds recall what they read."""

import functools

import numpy as np
import pytest

from experiments.infini.needle import facts, model, recall, shut, train
from lclm.config import LayerSpec, ModelConfig, Run
from lclm.specs import MambaSpec


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_a_fact_three_segments_back_comes_out_of_the_memory(rule):
    lm = train(model(rule), facts, steps=1000, rate=1e-2, scale=True)
    assert recall(lm, facts) > 0.9
    assert recall(shut(lm), facts) < 0.5  # chance is 1 / VALUES


MARK, WORDS = 8, 8


def induction(length: int, rng: np.random.Generator, rows: int):
    """A mark and a word somewhere; the mark again at the end asks for the word."""
    texts = rng.integers(0, WORDS, (rows, length))
    where = rng.integers(0, length - 2, rows)
    at = np.arange(rows)
    texts[at, where] = texts[:, -1] = MARK
    return texts.astype(np.int32), texts[at, where + 1, None].astype(np.int32)


@pytest.mark.slow
def test_mamba_copies_the_word_after_a_mark_also_far_past_its_training_length():
    layer = LayerSpec(MambaSpec(inner=64, rank=2, state=8), None)
    config = ModelConfig("mamba", MARK + 1, 32, (Run((layer,), 2),), 64)
    lm = train(config, functools.partial(induction, 24), steps=1000, rate=5e-3)
    assert recall(lm, functools.partial(induction, 24)) > 0.95
    assert recall(lm, functools.partial(induction, 96)) > 0.8
