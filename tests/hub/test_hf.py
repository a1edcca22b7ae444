"""Hugging Face folders: same bytes out as in, and nothing believed unchecked."""

import dataclasses
import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, MODELS
from safetensors.numpy import load_file, save_file

from lclm import hub
from lclm.config import RopeSpec, find_runs
from lclm.errors import LclmError
from lclm.hub import hf_folder as hf_folder_module
from lclm.hub.hf_config import FAMILIES, config_from_hf, config_to_hf
from lclm.hub.names import HF_TABLES, hf_names, param_shapes
from lclm.tree import flatten

WEIGHTS = "model.safetensors"


def table_of(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_names_are_a_bijection_with_the_file(name):
    config = hub.describe(GOLDEN / name)
    names = hf_names(config, config.family)
    assert list(names) == list(param_shapes(config))
    stored = [
        each
        for value in names.values()
        for each in ([value] if isinstance(value, str) else value)
    ]
    assert sorted(stored) == sorted(load_file(GOLDEN / name / WEIGHTS))


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_exact(name, tmp_path):
    bundle = hub.load(GOLDEN / name)
    hub.save_hf(tmp_path / "out", bundle)
    before, after = (
        load_file(GOLDEN / name / WEIGHTS),
        load_file(tmp_path / "out" / WEIGHTS),
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert value.tobytes() == after[key].tobytes(), key
    assert hub.load(tmp_path / "out").config == bundle.config


@pytest.mark.parametrize("name", MODELS)
def test_exported_config_says_what_transformers_wrote(name):
    table = table_of(name)
    again = config_to_hf(hub.describe(GOLDEN / name))
    if table.get("head_dim", 0) is None:  # the width over the heads
        table["head_dim"] = table["hidden_size"] // table["num_attention_heads"]
    for key in again.keys() & table.keys():
        assert again[key] == table[key], key


def test_bfloat16_survives_and_shards_join(tmp_path, hf_folder):
    folder, out = hf_folder("qwen3"), tmp_path / "out"
    narrow = {
        k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(folder / WEIGHTS).items()
    }
    save_file(narrow, folder / WEIGHTS)
    bundle = hub.load(folder)
    hf_folder_module.save_hf(out, bundle, shard_bytes=8000)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    joined = {k: v for s in shards for k, v in load_file(s).items()}
    assert joined.keys() == narrow.keys()
    assert all(joined[k].tobytes() == narrow[k].tobytes() for k in narrow)
    again = flatten(hub.load(out).params)
    assert all(v.dtype == jnp.bfloat16 for v in again.values())
    hub.save_hf(out, bundle)
    assert not list(out.glob("model-*")) and hub.load(out).config == bundle.config


def test_surplus_tensors_of_old_files_are_left_alone(hf_folder):
    folder = hf_folder("llama_tied")
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, folder / WEIGHTS)
    assert "head" not in hub.load(folder).params


def test_every_bad_tensor_is_named_and_none_is_read(hf_folder, monkeypatch):
    folder = hf_folder()
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.mlp.spare.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:3]
    save_file(tensors, folder / WEIGHTS)
    monkeypatch.delattr("lclm.hub.safetensors_io.TensorFolder.read")
    with pytest.raises(LclmError) as caught:
        hub.load(folder)
    for words in (
        "1 missing: model.norm.weight",
        "model.layers.0.mlp.spare.weight",
        "lm_head.weight is (3, 32), expected (64, 32)",
    ):
        assert words in str(caught.value)


def test_an_integer_tensor_is_refused(hf_folder):
    folder = hf_folder()
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(LclmError, match=r"model.norm.weight has type I8; readable"):
        hub.load(folder)


@pytest.mark.parametrize("size", [0, 7, 8, 300, 20000])
def test_truncated_safetensors_are_an_error(hf_folder, size):
    folder = hf_folder()
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:size])
    with pytest.raises(LclmError, match=r"not a usable safetensors.*fetch it again"):
        hub.load(folder)


def test_a_header_length_beyond_the_file_is_an_error(hf_folder):
    folder = hf_folder()
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(b"\xff" * 8 + data[8:])
    with pytest.raises(LclmError, match="not a usable safetensors"):
        hub.load(folder)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", 3]
)
def test_a_shard_outside_the_folder_is_refused(hf_folder, shard):
    folder = hf_folder()
    os.rename(folder / WEIGHTS, folder.parent / "x.safetensors")
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(LclmError, match=r"same folder"):
        hub.load(folder)


def test_weights_in_a_pickle_and_the_form_of_another_repository_are_refused(
    hf_folder, tmp_path
):
    folder = hf_folder()
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(LclmError, match=r"pytorch_model\.bin is a Python pickle"):
        hub.load(folder)
    (tmp_path / "config.json").write_text('{"d_model": 768, "ssm_cfg": {}}')
    with pytest.raises(LclmError, match="state-spaces/mamba-130m-hf"):
        hub.load(tmp_path)


def test_a_missing_shard_and_a_lying_index_are_named(hf_folder):
    folder = hf_folder()
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(LclmError, match=r"model-1.safetensors: no such file"):
        hub.load(folder)
    index.write_text(json.dumps({"weight_map": {"a": WEIGHTS}}))
    with pytest.raises(LclmError, match="places tensor a in model"):
        hub.load(folder)
    index.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(LclmError, match="no weight_map"):
        hub.load(folder)


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff\xfe", b"[" * 100000])
def test_malformed_json_is_one_error(hf_folder, data):
    folder = hf_folder()
    (folder / "config.json").write_bytes(data)
    with pytest.raises(LclmError, match=r"config.json (is not valid JSON|holds)"):
        hub.load(folder)


BAD = {
    "model_type": ("lama", "did you mean 'llama'"),
    "num_key_value_head": (2, "did you mean 'num_key_value_heads'"),
    "quantization_config": ({"bits": 4}, "unknown key 'quantization_config'"),
    "hidden_size": ("32", "expected int"),
    "num_hidden_layers": (0, "at least 1"),
    "hidden_act": ("relu2", "known are gelu"),
    "is_encoder_decoder": (True, "only False is implemented"),
    "eos_token_id": ("</s>", "expected numbers"),
    "tie_word_embeddings": (1, "expected bool"),
    "num_attention_heads": (3, "kv heads|leaves a rest"),
    "vocab_size": (None, "vocab_size is missing"),
}


@pytest.mark.parametrize("key", BAD)
def test_a_bad_config_key_is_named_with_its_remedy(key):
    value, words = BAD[key]
    table = table_of("llama") | {key: value}
    if key == "num_attention_heads":
        table.pop("head_dim")
    with pytest.raises(LclmError, match=words):
        config_from_hf(table)


def test_the_families_agree_in_both_tables():
    assert FAMILIES.keys() == HF_TABLES.keys()


def test_mistral_slides_everywhere_by_default_and_nowhere_when_null():
    table = table_of("mistral")
    assert {s.mixer.window for s in config_from_hf(table).layers} == {5}
    assert (
        config_from_hf(table | {"sliding_window": None}).layers[0].mixer.window is None
    )
    table.pop("sliding_window")
    assert config_from_hf(table).layers[0].mixer.window == 4096


def test_qwen_windows_follow_switch_and_first_layer():
    table = table_of("qwen2") | {"layer_types": None, "num_hidden_layers": 3}

    def windows(**changes):
        layers = config_from_hf(table | changes).layers
        return [s.mixer.window for s in layers]

    assert windows() == [None, 5, 5]
    assert windows(max_window_layers=2) == [None, None, 5]
    assert windows(use_sliding_window=False) == [None, None, None]
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(layer_types=kinds) == [5, None, None]
    with pytest.raises(LclmError, match="names 1 layers"):
        windows(layer_types=kinds[:1])
    with pytest.raises(LclmError, match="chunked"):
        windows(layer_types=["chunked", *kinds[1:]])


@pytest.mark.parametrize("key", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_gemma_every_nth_layer_is_global(key):
    table = table_of("gemma3") | {"num_hidden_layers": 7}
    table.pop("layer_types")
    table.pop("_sliding_window_pattern")
    old = {
        "rope_parameters": None,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    config = config_from_hf(table | old | {key: 3})
    assert [s.mixer.window is None for s in config.layers] == [
        False,
        False,
        True,
    ] * 2 + [False]
    local, whole = config.layers[0].mixer.rope, config.layers[2].mixer.rope
    assert (local.kind, local.theta) == ("default", 1e4)
    assert (whole.kind, whole.theta, whole.factor) == ("linear", 1e6, 8.0)
    assert config.layers[0].mixer.scale == pytest.approx(24**-0.5)
    six = config_from_hf(table | old)
    assert [s.mixer.window is None for s in six.layers] == [False] * 5 + [True, False]


def test_the_default_scale_is_not_spelled_out():
    table = table_of("gemma3") | {"query_pre_attn_scalar": 16}
    assert config_from_hf(table).layers[0].mixer.scale is None


def test_an_export_that_would_not_read_back_is_refused(tmp_path):
    bundle = hub.load(GOLDEN / "llama")
    layer = bundle.config.layers[0]
    exact = dataclasses.replace(layer.mixer, rope=RopeSpec(context=64, angles="exact"))
    runs = find_runs((dataclasses.replace(layer, mixer=exact),) * 2)
    config = dataclasses.replace(bundle.config, stack=runs)
    with pytest.raises(LclmError, match="format='orbax'"):
        hub.save_hf(tmp_path / "out", dataclasses.replace(bundle, config=config))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    bundle = hub.load(GOLDEN / "llama")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_folder_module.json, "dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        hub.save_hf(tmp_path / "out", bundle)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_packed():
    with pytest.raises(LclmError, match="load it with packed=None"):
        hub.load(GOLDEN / "llama", packed="int8")
