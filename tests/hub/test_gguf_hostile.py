"""A GGUF header is a stranger's: every lie in it is one error, and nothing is sized."""

import struct
import tracemalloc

import pytest
from conftest import header, text, write_gguf

from lclm import hub
from lclm.errors import LclmError
from lclm.hub.gguf_file import GgufFile

U64 = 2**64 - 1
ARRAY, STRING, U32 = 9, 8, 4


def tensor(name=b"t", *, rank=1, dims=(32,), kind=0, offset=0) -> bytes:
    sizes = b"".join(struct.pack("<Q", d) for d in dims)
    return (
        text(name) + struct.pack("<I", rank) + sizes + struct.pack("<IQ", kind, offset)
    )


def key(name: str, kind: int, body: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + body


def array(kind: int, count: int) -> bytes:
    return struct.pack("<IQ", kind, count)


PAD = bytes(256)
HOSTILE = {
    "wrong magic": (header(0, 0, magic=b"GGML"), "instead of"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
    "future version": (header(0, 0, version=9), "version 9"),
    "tensor count": (header(U64, 0) + PAD, "tensor count"),
    "key count": (header(0, 1 << 40) + PAD, "key count"),
    "key length": (header(0, 1) + struct.pack("<Q", U64) + PAD, "metadata key"),
    "value length": (
        header(0, 1) + key("a", STRING, struct.pack("<Q", 1 << 50)) + PAD,
        "length of a",
    ),
    "array count": (
        header(0, 1) + key("a", ARRAY, array(U32, 1 << 61)) + PAD,
        "item count of a",
    ),
    "string count": (
        header(0, 1) + key("a", ARRAY, array(STRING, 1 << 40)) + PAD,
        "string count of a",
    ),
    "nested arrays": (
        header(0, 1) + key("a", ARRAY, array(ARRAY, 1) + array(ARRAY, 1)) + PAD,
        "value type 9",
    ),
    "value type": (header(0, 1) + key("a", 77, b"") + PAD, "value type 77"),
    "not UTF-8": (header(0, 1) + text(b"\xff\xfe") + PAD, "not UTF-8"),
    "same key twice": (header(0, 2) + key("a", 0, b"\1") * 2 + PAD, "occurs twice"),
    "alignment": (
        header(0, 1) + key("general.alignment", U32, struct.pack("<I", 3)) + PAD,
        "power of two",
    ),
    "rank": (header(1, 0) + tensor(rank=9) + PAD, "9 dimensions"),
    "size": (header(1, 0) + tensor(dims=(1 << 60,)) + PAD, "claims"),
    "product": (
        header(1, 0) + tensor(rank=4, dims=(1 << 62,) * 4) + PAD,
        "claims",
    ),
    "zero": (header(1, 0) + tensor(dims=(0,)) + PAD, "shape"),
    "offset": (header(1, 0) + tensor(offset=1 << 40) + PAD, "beyond the end"),
    "odd offset": (header(1, 0) + tensor(offset=1) + PAD, "aligned"),
    "data type": (header(1, 0) + tensor(kind=1234) + PAD, "data type 1234"),
    "same tensor twice": (header(2, 0) + tensor() * 2 + PAD, "occurs twice"),
    "empty": (b"", "truncated"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_each_lie_is_one_error_and_no_memory(tmp_path, name):
    data, words = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(LclmError, match=words) as caught:
        GgufFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert str(path) in str(caught.value)


def test_every_truncation_of_a_real_file_is_an_error(tmp_path):
    whole = tmp_path / "whole.gguf"
    write_gguf(whole)
    data = whole.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 2000, 37), len(data) // 2, len(data) - 33]:
        path.write_bytes(data[:size])
        with pytest.raises(LclmError):
            hub.load(path)


def test_a_file_that_is_not_there_names_what_could_be():
    with pytest.raises(LclmError, match=r"smollm2-135m.*Hugging Face folder"):
        hub.load("nowhere.gguf")
    with pytest.raises(LclmError, match="did you mean 'smollm2-135m'"):
        hub.load("smollm-135m")


def test_an_unknown_architecture_names_the_known_ones(tmp_path):
    path = tmp_path / "other.gguf"
    write_gguf(path, "mpt")
    with pytest.raises(LclmError, match=r"architecture 'mpt'.*gemma3, .*llama"):
        hub.load(path)


def test_missing_extra_and_misshapen_tensors_are_all_named(tmp_path):
    path = tmp_path / "m.gguf"
    weights = write_gguf(path)
    weights["blk.0.attn_gate.weight"] = weights.pop("blk.0.ffn_up.weight")
    weights["blk.1.ffn_up.weight"] = weights["blk.1.ffn_up.weight"][:32]
    write_gguf(path, weights=weights)
    with pytest.raises(LclmError) as caught:
        hub.load(path)
    for words in (
        "1 missing: blk.0.ffn_up.weight",
        "not part of this model: blk.0.attn_gate.weight",
        "blk.1.ffn_up.weight is (32, 32), expected (64, 32)",
    ):
        assert words in str(caught.value)


def test_a_depth_beyond_the_tensors_builds_no_layers(tmp_path):
    path = tmp_path / "deep.gguf"
    write_gguf(path)
    data = path.read_bytes()
    at = data.index(b"block_count") + len(b"block_count") + 4
    path.write_bytes(data[:at] + struct.pack("<I", 2**31) + data[at + 4 :])
    with pytest.raises(LclmError, match="block_count is 2147483648"):
        hub.load(path)


def test_an_unknown_packing_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    with pytest.raises(LclmError, match="'int3': known are int4, int8"):
        hub.load(path, packed="int3")
