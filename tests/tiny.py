"""Models small enough to compile in a second, shared by tests."""

import functools

import jax
import numpy as np

from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    RopeSpec,
    find_runs,
)
from lclm.language_model import LanguageModel
from lclm.models.decoder import init_params

VOCAB = 97
ROPE = RopeSpec(context=64)


def tiny_rope(kind, **kwargs):
    """A valid rotary embedding of every kind for head_dim 16 and 64 positions."""
    extra = {
        "linear": {"factor": 4.0},
        "ntk": {"factor": 4.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original": 16},
        "yarn_paper": {"factor": 4.0, "original": 16},
        "longrope": {
            "original": 16,
            "short_factor": (1.0,) * 8,
            "long_factor": tuple(1.0 + i for i in range(8)),
        },
        "llama3": {
            "factor": 8.0,
            "original": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "proportional": {"partial": 0.5},
    }.get(kind, {})
    return RopeSpec(**{"kind": kind, "context": 64, **extra, **kwargs})


def tiny_config(*, windows=(None, None), rope=ROPE, eos=(), **spec) -> ModelConfig:
    """Two layers of 4 query and 2 kv heads over 97 tokens."""
    layers = tuple(
        LayerSpec(AttentionSpec(4, 2, 8, rope, window=w, **spec), MlpSpec(48))
        for w in windows
    )
    return ModelConfig("llama", VOCAB, 32, find_runs(layers), 64, eos=eos)


def lively(params, scale: float = 0.3):
    """Parameters far from their tame initial values, so that mistakes show."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [
        leaf + scale * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


@functools.cache
def tiny_lm(**kw) -> LanguageModel:
    """A language model over `tiny_config(**kw)` with lively parameters."""
    config = tiny_config(**kw)
    return LanguageModel(config, lively(init_params(config, jax.random.key(0))))


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random tokens [rows, length]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def dense_nll(lm: LanguageModel, text: np.ndarray) -> np.ndarray:
    """Next-token losses of a dense parallel pass."""
    logp = np.asarray(jax.nn.log_softmax(lm.logits(text)[:, :-1]))
    return -np.take_along_axis(logp, text[:, 1:, None], 2)[..., 0]
