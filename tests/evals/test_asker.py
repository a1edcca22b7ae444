"""A grid's prompts that begin alike are read once as far as they agree."""

from lclm.evals import retrieval
from lclm.evals.base import Example, Query
from lclm.evals.retrieval import Asker, Cell
from tests.tiny import VOCAB, tiny_lm


class Letters:
    """A token a character."""

    add_bos = False

    def encode(self, text, bos=False):
        return [ord(c) % VOCAB for c in text]

    def stream(self):
        return self

    def push(self, token):
        return chr(97 + token % 26)

    def flush(self):
        return ""


def example(context):
    return Example(context, (Query("?", ("x",), max_new_tokens=6),))


def test_answers_are_those_of_prompts_read_anew_and_less_is_read(monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", 8)
    whole = "abcdefgh" * 4
    lm, texts = tiny_lm(), [whole, whole[:19] + "x" * 13, whole]
    lm.tokenizer = Letters()
    asker, cell = Asker(lm, "seen"), Cell(33, 0.5, 0, "full")
    read = []
    for text in texts:
        said = asker.answer(example(text), cell)
        read.append(asker.context.stats.prompt_tokens)
        fresh = lm.generate(text + "?", max_new_tokens=6)
        assert said["prediction"] == fresh.text
        assert said["cache_bytes"] >= fresh.stats.bytes
    assert read == [33, 17, 17]


def test_a_cache_that_evicts_reads_every_prompt():
    lm = tiny_lm()
    lm.tokenizer = Letters()
    asker = Asker(lm, "seen")
    asker.answer(example("abcdefgh" * 2), Cell(17, 0.5, 0, "h2o:budget=9"))
    assert asker.context is None
