"""Mamba-1 files: Hugging Face folders in two spellings, and GGUF."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from lclm import hub
from lclm.errors import LclmError
from lclm.hub.gguf_mamba import MIXER
from lclm.hub.hf_config import config_from_hf, config_to_hf
from lclm.hub.names import gguf_names
from lclm.models.presets import preset
from lclm.tree import flatten

WEIGHTS = "model.safetensors"
EMBEDDING = "backbone.embeddings.weight"


def table_of(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


def test_the_official_spelling_of_the_embedding_is_read(hf_folder):
    folder = hf_folder("mamba")
    tensors = load_file(folder / WEIGHTS)
    table = tensors.pop(EMBEDDING)
    tensors |= {"backbone.embedding.weight": table, "lm_head.weight": table}
    save_file(tensors, folder / WEIGHTS)
    assert np.array_equal(hub.load(folder).params["embed"]["table"], table)


def test_missing_and_extra_tensors_are_listed_together(hf_folder):
    folder = hf_folder("mamba")
    tensors = load_file(folder / WEIGHTS)
    tensors["backbone.layers.0.mixer.spare"] = tensors.pop(
        "backbone.layers.0.mixer.A_log"
    )
    del tensors["backbone.layers.1.mixer.D"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(LclmError) as caught:
        hub.load(folder)
    for words in ("2 missing", "layers.0.mixer.A_log", "layers.1.mixer.D", "spare"):
        assert words in str(caught.value)


def test_the_published_config_is_the_preset():
    table = {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "bos_token_id": 0,
        "conv_kernel": 4,
        "eos_token_id": 0,
        "expand": 2,
        "hidden_act": "silu",
        "hidden_size": 768,
        "intermediate_size": 1536,
        "layer_norm_epsilon": 1e-05,
        "num_hidden_layers": 24,
        "rescale_prenorm_residual": False,
        "residual_in_fp32": True,
        "state_size": 16,
        "time_step_rank": 48,
        "use_bias": False,
        "use_conv_bias": True,
        "vocab_size": 50280,
    }
    assert config_from_hf(table) == preset("mamba-130m")
    short = {"model_type": "mamba", "num_hidden_layers": 24, "time_step_rank": "auto"}
    assert config_from_hf(short) == preset("mamba-130m")


BAD = {
    "hidden_act": ("gelu", "only 'silu' is implemented"),
    "state_size": (0, "state_size is 0; it must be at least 1"),
    "intermediate_size": (48, "expand x hidden_size is 64"),
    "time_step_rank": ("large", "time_step_rank is 'large'; expected int"),
    "conv_kernels": (4, "unknown key 'conv_kernels'.*did you mean 'conv_kernel'"),
}


@pytest.mark.parametrize("key", BAD)
def test_a_bad_config_key_is_named_with_its_remedy(key):
    value, words = BAD[key]
    with pytest.raises(LclmError, match=words):
        config_from_hf(table_of("mamba") | {key: value})


def test_a_model_that_the_config_cannot_say_is_not_written():
    config = hub.describe(GOLDEN / "mamba")
    layer = config.layers[0]
    for change in ({"inner_norms": True}, {"inner": 65}):
        mixer = dataclasses.replace(layer.mixer, **change)
        odd = dataclasses.replace(layer, mixer=mixer)
        run = dataclasses.replace(config.stack[0], group=(odd,))
        with pytest.raises(LclmError, match="orbax"):
            config_to_hf(dataclasses.replace(config, stack=(run,)))


def write_gguf(path, bundle):
    """The model as llama.cpp's converter stores it; gives the stored tensors."""
    config = bundle.config
    spec, names = config.layers[0].mixer, gguf_names(config)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_block_count(len(config.layers))
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_layer_norm_rms_eps(config.norm.eps)
    writer.add_ssm_conv_kernel(spec.conv)
    writer.add_ssm_inner_size(spec.inner)
    writer.add_ssm_state_size(spec.state)
    writer.add_ssm_time_step_rank(spec.rank)
    stored = {}
    for path_, value in flatten(bundle.params).items():
        value = np.asarray(value)
        if path_.endswith("a_log"):
            value = -np.exp(value)
        if path_.endswith("conv/weight"):
            value = value.squeeze()
        stored[names[path_]] = value
        writer.add_tensor(names[path_], value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("name", ["mamba", "mamba_bias"])
def test_gguf_gives_the_weights_of_hugging_face(tmp_path, name):
    bundle, path = hub.load(GOLDEN / name), tmp_path / "m.gguf"
    stored = write_gguf(path, bundle)
    read = hub.load(path)
    assert read.config.layers == bundle.config.layers
    assert read.config.tied == bundle.config.tied
    want = flatten(bundle.params)
    for key, value in flatten(read.params).items():
        exact = not key.endswith("a_log")
        np.testing.assert_allclose(value, want[key], atol=0 if exact else 1e-6)
    known = set(gguf.TENSOR_NAMES.values())
    for tensor in stored:
        block = tensor.removesuffix(".weight").removesuffix(".bias")
        assert (
            block.replace("blk.0", "blk.{bid}").replace("blk.1", "blk.{bid}") in known
        )
    assert MIXER["a_log"] == "ssm_a" and "blk.0.ssm_a" in stored


def test_gguf_lists_what_is_missing(tmp_path):
    bundle, path = hub.load(GOLDEN / "mamba"), tmp_path / "m.gguf"
    del bundle.params["layers_1"]["mamba"]["d"]
    write_gguf(path, bundle)
    with pytest.raises(LclmError, match=r"1 missing: blk\.1\.ssm_d"):
        hub.load(path)
