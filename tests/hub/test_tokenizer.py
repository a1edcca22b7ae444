"""Text to ids and back, whole or piece by piece."""

import json
import random

import pytest
import tokenizers
from conftest import GOLDEN, write_gguf
from hypothesis import given
from hypothesis import strategies as st

from lclm import hub
from lclm.errors import LclmError
from lclm.hub.chat import render_chat
from lclm.hub.tokenizer import Tokenizer
from lclm.hub.tokenizer_files import read_tokenizer, write_tokenizer

BYTES = hub.ByteTokenizer()
SPM = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
SPM += ["▁", "a", "b", "c", "ab", "▁a", "▁ab", "abc", "é"]


def spm_vocabulary(prefix):
    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(SPM)
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(9)])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 9)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(prefix)

    return add


def level_vocabulary(pre):
    marks = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([*marks, "12", "ab", "<|end|>", "<tool>"])
        writer.add_token_types([1] * 258 + [3, 4])
        writer.add_token_merges(["1 2", "a b"])
        writer.add_eos_token_id(258)
        writer.add_chat_template("{{ messages[0]['content'] }}{{ eos_token }}")

    return add


def from_gguf(folder, vocabulary):
    write_gguf(folder / "t.gguf", vocabulary=vocabulary)
    from lclm.hub.gguf_file import GgufFile
    from lclm.hub.gguf_vocab import gguf_tokenizer

    return gguf_tokenizer(GgufFile(folder / "t.gguf"))


@pytest.fixture(scope="module", params=["bytes", "level", "spm", "gemma"])
def codec(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    if request.param == "bytes":
        return BYTES
    if request.param == "level":
        return from_gguf(folder, level_vocabulary("smollm"))
    return from_gguf(folder, spm_vocabulary(request.param == "spm"))


def test_decode_inverts_encode(codec):
    for text in ("abc ab", "héllo 日本語 🎉", "12 123\n\n  x"):
        assert codec.decode(codec.encode(text)) == text


def test_pieces_of_a_stream_add_up_to_decode(codec):
    generator = random.Random(0)
    for ids in (
        codec.encode("naïve 日本 🎉 ab"),
        [generator.randrange(codec.vocab_size) for _ in range(200)],
    ):
        stream = codec.stream()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == codec.decode(ids)


def test_a_stream_never_shows_half_a_character(codec):
    stream = codec.stream()
    assert all("\ufffd" not in stream.push(i) for i in codec.encode("日🎉é ab"))


@given(st.text())
def test_bytes_keep_every_text(text):
    safe = text.encode("utf-8", "replace").decode()
    assert BYTES.decode(BYTES.encode(safe)) == safe


def test_bos_goes_in_front_only_when_asked():
    assert BYTES.encode("a", bos=True) == [256, 97]
    assert BYTES.encode("a") == [97]


def test_smollm_splits_digits_and_gpt2_does_not(tmp_path):
    split = from_gguf(tmp_path, level_vocabulary("smollm"))
    whole = from_gguf(tmp_path, level_vocabulary("gpt-2"))
    assert len(split.encode("12")) == 2 and len(whole.encode("12")) == 1


def test_control_tokens_vanish_from_text_and_user_tokens_stay(tmp_path):
    codec = from_gguf(tmp_path, level_vocabulary("smollm"))
    ids = codec.encode("ab<|end|><tool>")
    assert ids[1:] == [258, 259]
    assert codec.decode(ids) == "ab<tool>"
    assert codec.decode(ids, special=True) == "ab<|end|><tool>"
    assert codec.chat([{"role": "user", "content": "Hi"}]) == "Hi<|end|>"


def test_spm_merges_follow_the_scores(tmp_path):
    codec = from_gguf(tmp_path, spm_vocabulary(True))
    assert [SPM[i] for i in codec.encode("abc")] == ["▁ab", "c"]
    assert codec.add_bos and codec.bos_id == 1
    bare = from_gguf(tmp_path, spm_vocabulary(False))
    assert [SPM[i] for i in bare.encode("abc")] == ["abc"]


@pytest.mark.parametrize("model,words", [("wordpiece", "gpt2, llama"), (None, None)])
def test_other_vocabularies_are_named_and_none_is_none(tmp_path, model, words):
    def add(writer):
        if model:
            writer.add_tokenizer_model(model)
            writer.add_token_list(["a"])

    if words is None:
        assert from_gguf(tmp_path, add) is None
    else:
        with pytest.raises(LclmError, match=words):
            from_gguf(tmp_path, add)


def test_an_unknown_pre_tokeniser_is_an_error(tmp_path):
    with pytest.raises(LclmError, match=r"'smolm'.*did you mean 'smollm'"):
        from_gguf(tmp_path, level_vocabulary("smolm"))


def test_files_keep_ids_specials_and_template(tmp_path):
    (tmp_path / "x").mkdir()
    codec = from_gguf(tmp_path, level_vocabulary("smollm"))
    write_tokenizer(tmp_path / "x", codec)
    again = read_tokenizer(tmp_path / "x", bos=None, eos=())
    assert again.specials == codec.specials
    text = "ab 12 é<|end|>"
    assert again.encode(text) == codec.encode(text)


def test_byte_ids_are_the_same_in_a_file(tmp_path):
    write_tokenizer(tmp_path, BYTES)
    again = read_tokenizer(tmp_path, bos=None, eos=())
    assert again.encode("é\n 🎉\0", bos=True) == BYTES.encode("é\n 🎉\0", bos=True)
    assert (again.bos_id, again.eos_ids, again.pad_id) == (256, (257,), 258)
    assert again.vocab_size == BYTES.vocab_size


def test_a_folder_without_a_tokenizer_loads():
    assert hub.load(GOLDEN / "llama").tokenizer is None


def test_a_broken_tokenizer_file_is_an_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LclmError, match=r"not a tokenizer.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_template_file_goes_before_the_settings(tmp_path):
    write_tokenizer(tmp_path, BYTES)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [
        {"name": "tool", "template": "T"},
        {"name": "default", "template": "{{ messages | length }}"},
    ]
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(settings | {"chat_template": named}))
    messages = [{"role": "user", "content": "Hi"}]
    assert read_tokenizer(tmp_path, bos=None, eos=()).chat(messages) == "1"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_tokenizer(tmp_path, bos=None, eos=()).chat(messages) == "file"


REFUSED = {
    None: "no chat template",
    "{{": "refused",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ ''.__class__.__mro__ }}": "refused",
    "{{ messages.append(1) }}": "refused",
    "{{ messages[0]['content'] + 1 }}": "refused",
}


@pytest.mark.parametrize("template", REFUSED)
def test_a_template_can_refuse_and_cannot_escape(template):
    with pytest.raises(LclmError, match=REFUSED[template]):
        render_chat(
            template,
            [{"role": "user", "content": "Hi"}],
            names={},
            add_generation_prompt=True,
        )


def test_a_message_without_a_role_is_named():
    with pytest.raises(LclmError, match="needs 'role'"):
        render_chat("x", [{"content": 1}], names={}, add_generation_prompt=True)
