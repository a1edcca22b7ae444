"""A needle outside the window: which policies still know it is what their rules say.

The model is an induction head written down, not trained. Its first layer attends to
the token before, by a rotation that peaks at distance one, and copies it; its second
looks for earlier tokens that stood behind the token now read, and says them. A text is
filler that repeats, with one key and its value in it; the key asked again must give the
value.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.cache import make
from lclm.config import AttentionSpec, LayerSpec, ModelConfig, RopeSpec, Run
from lclm.language_model import LanguageModel
from lclm.learned import Extra, fingerprint, save_extra, shape
from lclm.models.decoder import unembed
from lclm.ops import rope
from lclm.serve.session import Session

KEYS, VALUES, FILL = 4, 4, 4
VOCAB, SIZE, WIDTH = KEYS + VALUES + FILL, 16, 64
NOW, BEFORE, SAID, ONE = 0, SIZE, 2 * SIZE, 3 * SIZE  # places in the residual stream
ROPE = RopeSpec(theta=100.0, context=1024)
CONFIG = ModelConfig(
    "induction",
    VOCAB,
    WIDTH,
    tuple(
        Run((LayerSpec(AttentionSpec(1, 1, SIZE, rope=r), None),), 1)
        for r in (ROPE, None)
    ),
    1024,
    tied=False,
)
ROWS, LENGTH, BUDGET, CHUNK = 16, 160, 32, 16


def matrix(rows: int, columns: int, *blocks: tuple[int, int, float]) -> np.ndarray:
    """Zeros, but for a scaled identity of `SIZE` at each (row, column)."""
    out = np.zeros((rows, columns), np.float32)
    for row, column, scale in blocks:
        size = min(SIZE, rows - row)
        out[row : row + size, column : column + size] = scale * np.eye(size)
    return out


@functools.cache
def model() -> LanguageModel:
    """The induction head, its projections made for residuals divided by their size."""
    embed = matrix(VOCAB, WIDTH, (0, NOW, 1.0))
    embed[:, ONE] = 1.0
    first, second = (WIDTH / 2) ** -0.5, (WIDTH / 3) ** -0.5
    # A key turned one position back is what a query meets at distance one.
    key = np.repeat([1.0, 0.0], SIZE // 2).astype(np.float32)
    cos, sin = rope.angles(np.ones((1, 1), np.int32), ROPE, SIZE)
    query = rope.rotate(jnp.asarray(key)[None, None, None], cos, -sin)[0, 0, 0]
    scales = np.zeros((2, SIZE, WIDTH), np.float32)
    scales[0, :, ONE], scales[1, :, ONE] = 120 * first * np.asarray(query), first * key
    back = {
        "q": scales[0],
        "k": scales[1],
        "v": matrix(SIZE, WIDTH, (0, NOW, first)),
        "o": matrix(WIDTH, SIZE, (BEFORE, 0, 1.0)),
    }
    match = {
        "q": matrix(SIZE, WIDTH, (0, NOW, 48 * second)),
        "k": matrix(SIZE, WIDTH, (0, BEFORE, second)),
        "v": matrix(SIZE, WIDTH, (0, NOW, second)),
        "o": matrix(WIDTH, SIZE, (SAID, 0, 4.0)),
    }
    norm = {"scale": np.ones(WIDTH, np.float32)}
    params = {
        "embed": {"table": embed},
        "final_norm": norm,
        "head": {"weight": matrix(VOCAB, WIDTH, (0, SAID, 1.0))},
    }
    for i, weights in enumerate((back, match)):
        attn = {name: {"weight": w} for name, w in weights.items()}
        params[f"layers_{i}"] = {"attn": attn, "norm1": norm}
    return LanguageModel(CONFIG, jax.tree.map(jnp.asarray, params))


@functools.cache
def needles() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts [ROWS, LENGTH], the keys to ask for [ROWS, 1] and their values [ROWS]."""
    rng, row = np.random.default_rng(0), np.arange(ROWS)
    texts = KEYS + VALUES + (row[:, None] + np.arange(LENGTH)) % FILL
    where = rng.integers(2 * BUDGET, LENGTH - 2 * BUDGET, ROWS)
    keys, values = rng.integers(0, KEYS, ROWS), KEYS + rng.permutation(row % VALUES)
    texts[row, where], texts[row, where + 1] = keys, values
    return texts, keys[:, None], values


def found(policy, *, aware: bool = False) -> float:
    """Share of values told; one that never changes is right in 1 / VALUES of them.

    `aware`: the text held the question when it was cut.
    """
    texts, keys, values = needles()
    lm = model()
    held = Session(lm._engine, policy, rows=ROWS, length=LENGTH + 2, chunk=CHUNK)
    held.read(np.concatenate([texts, keys], 1) if aware else texts)
    held.settle()
    held.read(keys)
    logits = np.asarray(unembed(lm.config, lm.params, held.last))
    said = KEYS + logits[:, KEYS : KEYS + VALUES].argmax(-1)
    return float(np.mean(said == values))


def heads(folder) -> str:
    """Retaining heads that rate a token by whether a key stood before it."""
    w1 = np.zeros((2, 1, 3 * SIZE), np.float32)
    w1[1, 0, SIZE : SIZE + KEYS] = 10.0  # the second layer's keys: the token before
    made = {"w1": w1, "w2": np.ones((2, 1, 1), np.float32)}
    own = fingerprint(model().params["embed"]["table"])
    extra = Extra("locret_heads", "tiny", made, shape(CONFIG), {}, own)
    return str(save_extra(folder, extra))


def test_quest_and_locret_hold_a_needle_that_has_left_the_window(tmp_path):
    near = f"streaming:sinks=4,window={BUDGET - 4}"
    assert found(make(near)) <= 1 / VALUES
    assert found(make(f"quest:budget={BUDGET},page=4,dense=1")) == 1
    assert found(make(f"locret:budget={BUDGET},heads={heads(tmp_path)}")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["window", "h2o", "snapkv", "pyramidkv", "expected_attention"]
)
def test_what_looks_at_earlier_queries_drops_what_none_of_them_asked_for(name):
    size = "window" if name == "window" else "budget"
    assert found(make(f"{name}:{size}={BUDGET}")) <= 1 / VALUES


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["full", f"keydiff:budget={BUDGET}"])
def test_keydiff_keeps_a_key_unlike_the_others_as_a_whole_cache_does(cache):
    assert found(make(cache)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snapkv", "tova"])
def test_a_cut_that_saw_the_question_keeps_its_answer(name):
    policy = make(f"{name}:budget={BUDGET},at=end")
    assert found(policy, aware=True) == 1
    if name != "tova":  # whose last query, a filler, rates the needle as most others
        assert found(policy) <= 1 / VALUES


@pytest.mark.slow
def test_a_pot_keeps_what_was_not_expected_or_what_its_catalyst_asks_for():
    def pot(alpha: float, *catalyst: int) -> float:
        table = {"name": "infinipot", "budget": BUDGET, "alpha": alpha}
        return found(make(table | {"catalyst": catalyst}))

    assert pot(1.0) == 1
    assert pot(0.0, *range(KEYS)) == 1
    assert pot(0.0, VOCAB - 1) <= 1 / VALUES


@pytest.mark.slow
def test_duo_holds_the_needle_where_the_matching_head_is_full():
    def duo(*full: bool) -> float:
        table = {"name": "duo", "sinks": 4, "window": BUDGET - 4}
        return found(make(table | {"heads": tuple((each,) for each in full)}))

    assert duo(False, True) == 1
    assert duo(True, False) <= 1 / VALUES
