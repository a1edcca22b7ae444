"""What the memories are for: tiny models trained in seconds recall what they read."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lclm.blocks.infini import GATE_RATE, is_gate
from lclm.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec, Run
from lclm.language_model import LanguageModel
from lclm.models.decoder import Decoder, init_params, unembed
from lclm.specs import InfiniSpec, MambaSpec

BATCH = 32
Sample = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def optimiser(rate: float, params) -> optax.GradientTransformation:
    """AdamW; memory gates get their own rate and no weight decay."""

    def label(path, _):
        return "gate" if is_gate("/".join(key.key for key in path)) else "rest"

    kinds = {
        "gate": optax.adam(GATE_RATE),
        "rest": optax.adamw(rate, weight_decay=1e-3),
    }
    return optax.multi_transform(kinds, jax.tree_util.tree_map_with_path(label, params))


def train(
    config: ModelConfig, sample: Sample, *, steps: int, rate: float, scale: bool = False
):
    """A model trained from scratch to give the answers that belong to the last tokens.

    `scale` starts matrices at full scale: at 0.02 all keys look alike to a memory.
    """
    params = init_params(config, jax.random.key(0))
    if scale:
        params = jax.tree.map(
            lambda x: x / (0.02 * x.shape[1] ** 0.5) if x.ndim == 2 else x, params
        )
    update = optimiser(rate, params)
    rng = np.random.default_rng(0)

    def loss(params, text, answer):
        hidden, _ = Decoder(config).apply({"params": params}, text)
        logits = unembed(config, params, hidden[:, -answer.shape[1] :])
        return optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(params, state, texts, answers):
        def step(carry, batch):
            params, state = carry
            value, slopes = jax.value_and_grad(loss)(params, *batch)
            change, state = update.update(slopes, state, params)
            return (optax.apply_updates(params, change), state), value

        (params, state), values = jax.lax.scan(step, (params, state), (texts, answers))
        return params, state, values

    state = update.init(params)
    for _ in range(steps // 50):
        batches = [sample(rng, BATCH) for _ in range(50)]
        texts, answers = (jnp.asarray(np.stack(x)) for x in zip(*batches, strict=True))
        params, state, values = run(params, state, texts, answers)
        if values[-10:].mean() < 0.02:
            break
    return LanguageModel(config, params)


def recall(lm: LanguageModel, sample: Sample, rows: int = 64) -> float:
    """Share of texts continued rightly, read in chunks and decoded."""
    texts, answers = sample(np.random.default_rng(99), rows)
    made = lm.generate(texts.tolist(), 1, chunk=16)
    right = [m.tokens == [a[-1]] for m, a in zip(made, answers, strict=True)]
    return float(np.mean(right))


# A fact binds one of KEYS to one of VALUES; the last token asks for a key.
KEYS, VALUES, FILL = 4, 4, 4
SEGMENT, SEGMENTS = 8, 4


def facts(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A fact of each key in the first segment, filler, a last segment of questions."""
    ask, fill = KEYS * VALUES, KEYS * VALUES + KEYS
    texts = fill + rng.integers(0, FILL, (rows, SEGMENT * SEGMENTS))
    where = rng.permuted(np.tile(np.arange(SEGMENT), (rows, 1)), axis=1)[:, :KEYS]
    values = rng.integers(0, VALUES, (rows, KEYS))
    at = np.arange(rows)[:, None]
    texts[at, where] = np.arange(KEYS) * VALUES + values
    keys = rng.integers(0, KEYS, (rows, SEGMENT))
    texts[:, -SEGMENT:] = ask + keys
    return texts.astype(np.int32), values[at, keys].astype(np.int32)


def infini(rule: str) -> ModelConfig:
    """One layer: whatever it knows of an earlier segment went through its memory."""
    local = AttentionSpec(4, 2, 16, RopeSpec(context=64))
    layer = LayerSpec(InfiniSpec(local, SEGMENT, rule), MlpSpec(64))
    vocab = KEYS * VALUES + KEYS + FILL
    return ModelConfig("infini", vocab, 32, (Run((layer,), 1),), 64)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_a_fact_three_segments_back_comes_out_of_the_memory(rule):
    lm = train(infini(rule), facts, steps=1000, rate=1e-2, scale=True)
    assert recall(lm, facts) > 0.9
    shut = jax.tree.map(lambda leaf: leaf, lm.params)
    shut["layers_0"]["infini"]["gate"] = jnp.full(4, -1e9)
    blind = LanguageModel(lm.config, shut)
    assert recall(blind, facts) < 0.5  # chance is 1 / VALUES


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
