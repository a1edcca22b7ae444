"""For lm-eval: a tokenizer that joins letters, texts to trip it, a model of bytes."""

import dataclasses
import random

import jax

from lclm.hub.tokenizer import ByteTokenizer
from lclm.language_model import LanguageModel
from lclm.models.decoder import init_params
from tests.tiny import lively, tiny_config


class Blocks:
    """Two letters a token: where a text is cut decides its tokens."""

    bos_id = 1
    eos_ids = (2,)

    def __init__(self, *, add_bos: bool):
        self.add_bos = add_bos

    def encode(self, text, *, bos=False):
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        ids = [sum(ord(c) << 8 * i for i, c in enumerate(p)) for p in pairs]
        return [self.bos_id] * bos + ids


def texts(rng: random.Random) -> tuple[str, str]:
    """A context, which may be empty or blank or end in blanks, and what follows."""
    words = ["a", "to", "the", "\n", "sea", "."]
    context = " ".join(rng.choices(words, k=rng.randint(0, 5)))
    context += rng.choice(["", "", " ", "\n", "  "])
    return context, rng.choice([" ", ""]) + " ".join(rng.choices(words, k=2))


def tiny_model(**kw) -> LanguageModel:
    """A random model of bytes."""
    config = dataclasses.replace(tiny_config(**kw), vocab=259, eos=(257,), bos=256)
    params = lively(init_params(config, jax.random.key(0)))
    return LanguageModel(config, params, ByteTokenizer(), name="tiny/bytes")
