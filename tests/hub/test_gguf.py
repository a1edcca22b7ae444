"""What a GGUF file holds comes out as Hugging Face would hold it."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HEADS, interleave, plain_weights, write_gguf

from lclm import hub
from lclm.config import RopeSpec
from lclm.hub.gguf_file import GgufFile
from lclm.hub.gguf_quants import PACKABLE, pack
from lclm.hub.names import gguf_names
from lclm.ops.packed import PackedWeight
from lclm.ops.rope import frequencies
from lclm.tree import flatten

Quant = gguf.GGMLQuantizationType


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_weights_come_back_in_hugging_face_order(tmp_path, arch):
    path, weights = tmp_path / "m.gguf", plain_weights(arch)
    stored = dict(weights)
    for name, value in weights.items():
        if arch == "llama" and "attn_q." in name:
            stored[name] = interleave(value, HEADS)
        if arch == "llama" and "attn_k." in name:
            stored[name] = interleave(value, HEADS // 2)
        if arch == "gemma3" and "norm" in name:
            stored[name] = value + 1
    write_gguf(path, arch, weights=stored)
    bundle = hub.load(path)
    names = gguf_names(bundle.config)
    assert sorted(names.values()) == sorted(weights)
    for ours, value in flatten(bundle.params).items():
        expected = weights[names[ours]]
        if arch == "gemma3" and "norm" in ours:
            np.testing.assert_allclose(value, expected, atol=3e-7)
        else:
            assert np.array_equal(value, expected), ours


def test_gemma3_metadata_gives_local_and_global_layers(tmp_path):
    path = tmp_path / "g.gguf"
    write_gguf(path, "gemma3", weights=plain_weights("gemma3", layers=7))
    config = hub.describe(path)
    assert [s.mixer.window for s in config.layers] == [5, 5, 5, 5, 5, None, 5]
    thetas = [s.mixer.rope.theta for s in config.layers]
    assert thetas == [1e4] * 5 + [5000.0, 1e4]
    assert config.norm.offset == 1 and config.embed_scale == 32**0.5
    assert config.layers[0].post_norms and config.layers[0].mixer.qk_norm


@pytest.mark.parametrize("kind", PACKABLE, ids=lambda k: k.name)
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_blocks_keep_every_value(kind, bits):
    weight = np.random.default_rng(0).standard_normal((24, 96), np.float32)
    raw = gguf.quantize(weight, kind)
    packed = pack(raw, kind, bits=bits)
    assert isinstance(packed, PackedWeight) and packed.shape == weight.shape
    expected = gguf.dequantize(raw, kind)
    assert np.array_equal(packed.dequantize(), expected)
    rows = jnp.asarray([[3, 3], [0, 23]])
    assert np.array_equal(packed.take(rows), expected[np.asarray(rows)])
    four = bits == 4 and kind in (Quant.Q4_0, Quant.Q4_1)
    assert packed.bits == (4 if four else 8)
    assert packed.nbytes <= weight.size * (0.625 if four else 1.125)


@pytest.mark.parametrize("packed", ["int8", "int4"])
def test_a_packed_model_holds_the_numbers_of_the_plain_one(tmp_path, packed):
    path = tmp_path / "q.gguf"
    write_gguf(path, kind=Quant.Q4_1)
    plain = flatten(hub.load(path).params)
    small = flatten(hub.load(path, packed=packed).params)
    kept = [p for p, w in small.items() if isinstance(w, PackedWeight)]
    assert len(kept) == sum(
        w.ndim == 2 and w.shape[-1] % 32 == 0 for w in plain.values()
    )
    for path_, weight in small.items():
        if path_ in kept:
            weight = weight.dequantize()
        assert np.array_equal(weight, plain[path_]), path_


def test_dtype_is_that_of_every_weight(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    wide = flatten(hub.load(path).params)
    narrow = flatten(hub.load(path, dtype=jnp.bfloat16).params)
    for name, value in narrow.items():
        assert value.dtype == jnp.bfloat16
        assert np.array_equal(value, wide[name].astype(jnp.bfloat16))


def test_llama3_frequency_factors_become_the_llama3_rule(tmp_path):
    path, weights = tmp_path / "l3.gguf", plain_weights("llama")
    base = RopeSpec(theta=5000.0, context=128)
    rule = RopeSpec(
        "llama3",
        theta=5000.0,
        context=128,
        factor=8.0,
        original=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    plain, scaled = (np.asarray(frequencies(s, 8)[0]) for s in (base, rule))
    # theta 5000 over 4 pairs reaches no wavelength beyond 8192: the factor is 1
    weights["rope_freqs.weight"] = (plain / scaled).astype(np.float32)
    write_gguf(path, weights=weights)
    rope = hub.describe(path).layers[0].mixer.rope
    assert np.allclose(frequencies(rope, 8)[0], scaled)
    weights["rope_freqs.weight"] = np.array([1, 2, 3, 4], np.float32)
    write_gguf(path, weights=weights)
    rope = hub.describe(path).layers[0].mixer.rope
    assert rope.kind == "longrope"
    assert np.allclose(frequencies(rope, 8, 100)[0], plain / [1, 2, 3, 4])


def test_metadata_is_what_the_gguf_package_reads(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    for field in theirs.fields.values():
        if not field.name.startswith("GGUF."):
            assert ours.metadata[field.name] == field.contents()
    for t in theirs.tensors:
        place = ours.tensors[t.name]
        assert (place.start, place.nbytes) == (t.data_offset, t.n_bytes)
        assert place.shape == tuple(reversed(t.shape.tolist()))
