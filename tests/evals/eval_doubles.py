"""Scripted stand-ins: a small real tokenizer, and models whose answers are known."""

import re
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, trainers

WORDS = (
    "In the first year the river rose over the fields. Nobody had seen such water "
    'before! "Where shall we go?" asked the miller. They went up the hill (with the '
    "cattle.) Naïve travellers — from far away — paid dearly; the café stayed shut. "
)
PROSE = " ".join(
    f"{WORDS} Chapter {i}: number {i * 37 % 101} was drawn, and {i} men left."
    for i in range(400)
)


class Bpe:
    """Byte-level BPE with the surface of `lclm.hub.tokenizer.Tokenizer`."""

    bos_id = 0

    def __init__(self):
        core = Core(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        core.train_from_iterator(
            [PROSE],
            trainers.BpeTrainer(
                vocab_size=600,
                special_tokens=["<s>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        self.core = core

    def encode(self, text, *, bos=False):
        return [0] * bos + self.core.encode(text).ids

    def decode(self, ids):
        return self.core.decode(list(ids))


class Letters:
    """A tokenizer for what never tokenises: a token a character."""

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


@dataclass
class Said:
    text: str


@dataclass
class Read:
    """A text that was read, and the tokens that no question may exceed."""

    lm: "Scripted"
    ids: list
    cache: str
    room: int

    def generate(self, question, *, max_new_tokens, keep=False):
        encode = self.lm.tokenizer.encode
        ids = self.ids + encode(question)
        assert len(ids) + max_new_tokens <= self.room
        said = Said("")
        if max_new_tokens:
            said = self.lm.generate(
                ids, max_new_tokens=max_new_tokens, cache=self.cache
            )
        if keep:
            self.ids = ids + encode(said.text)
        return said


class Scripted:
    """Losses that depend on the token and the position; answers found by search.

    `sees` limits `generate` to that many last tokens, as an evicting cache would.
    """

    def __init__(self, tokenizer, *, sees=None):
        self.tokenizer, self.sees, self.calls = tokenizer, sees, []
        self.start = []

    def encode(self, text):
        return self.start + self.tokenizer.encode(text)

    def nll(self, tokens, *, cache="full", chunk=512, progress=None):
        tokens = np.asarray(tokens)
        self.calls.append(("nll", cache, tokens.shape))
        for done in range(chunk, tokens.shape[1] + chunk, chunk):
            if progress is not None:
                progress(min(done, tokens.shape[1]))
        place = np.arange(1, tokens.shape[1])
        return (1 + tokens[:, 1:] % 7 / 7 + 1 / place).astype(np.float32)

    def prefill(self, text, *, cache="full", room=0):
        ids = self.encode(text) if isinstance(text, str) else list(text)
        self.calls.append(("prefill", cache, len(ids), len(ids) + room))
        return Read(self, ids, cache, len(ids) + room)

    def generate(self, prompt, *, max_new_tokens, cache="full", room=0):
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        self.calls.append(("generate", cache, len(ids)))
        text = self.tokenizer.decode(ids[-self.sees :] if self.sees else ids)
        asked = text[text.rfind("What") :]
        wanted = re.findall(r"\w+ \w+ code for \w+", asked.split("?")[0])
        facts = dict(re.findall(r"The (\w+ \w+ code for \w+) is (\d+)", text))
        key = re.findall(r"key is (\d{5})", text)
        found = [facts[w] for w in wanted if w in facts] if wanted else key[:1]
        said = " " + ", ".join(found) + "."
        return Said(self.tokenizer.decode(self.tokenizer.encode(said)[:max_new_tokens]))

    def resumes(self, cache):
        return False

    def cache_bytes(self, cache, length):
        return 1000 * (length if cache == "full" else 64)
