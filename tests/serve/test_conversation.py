"""A conversation reads each turn once and answers as if it had read everything."""

import functools

import jax
import pytest

from lclm.conversation import Conversation
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.models.decoder import init_params
from tests.tiny import lively, tiny_config, tiny_lm


class Letters:
    """A letter a token, and a template that can be continued."""

    add_bos = False

    def encode(self, text, bos=False):
        return [ord(c) - 32 for c in text]

    def stream(self):
        return self

    def push(self, token):
        return chr(token + 32)

    def flush(self):
        return ""

    def chat(self, messages, add_generation_prompt=True):
        said = "".join(f"[{m['role'][0]}]{m['content']}|" for m in messages)
        return said + "[a]" * add_generation_prompt


@functools.cache
def lm() -> LanguageModel:
    config = tiny_config()
    return LanguageModel(
        config, lively(init_params(config, jax.random.key(0))), Letters()
    )


def answer(talk: Conversation, text: str, **options):
    stream = talk.ask(text, 6, **options)
    assert "".join(stream) == stream.result.text
    return stream.result


def test_every_answer_is_that_to_the_whole_transcript():
    talk = Conversation(lm(), "full", system="be brief", chunk=16)
    for text in ("hello", "and then?"):
        whole = lm().tokenizer.chat([*talk.messages, {"role": "user", "content": text}])
        got = answer(talk, text)
        assert got.tokens == lm().generate(whole, 6, chunk=16).tokens
    assert got.stats.prompt_tokens == len("|[u]and then?|[a]")
    assert [m["role"][0] for m in talk.messages] == ["s", "u", "a", "u", "a"]


def test_what_was_made_behind_a_stop_string_was_not_said():
    free = answer(Conversation(lm(), "full", chunk=16), "hello").text
    talk = Conversation(lm(), "full", chunk=16)
    assert answer(talk, "hello", stop=free[2]).text == free[:2]
    whole = lm().tokenizer.chat([*talk.messages, {"role": "user", "content": "so"}])
    assert answer(talk, "so").tokens == lm().generate(whole, 6, chunk=16).tokens


def test_memory_stays_where_it_is_however_long_the_talk():
    talk = Conversation(lm(), "streaming:sinks=2,window=14", chunk=16)
    bytes_held = {answer(talk, f"turn {n}").stats.bytes for n in range(5)}
    assert len(bytes_held) == 1
    assert talk._session.start[0] > 60


def test_a_conversation_says_what_it_cannot_do():
    with pytest.raises(LclmError, match="no tokenizer"):
        Conversation(tiny_lm(), "full")
    for policy in ("h2o:at=end", "recompute"):
        with pytest.raises(LclmError, match="hands to the next"):
            Conversation(lm(), policy)
    talk = Conversation(lm(), "full", chunk=16)
    talk.ask("hello", 6)
    with pytest.raises(LclmError, match="left unread"):
        talk.ask("more", 6)
