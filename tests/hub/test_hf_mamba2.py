"""Mamba-2 folders: gradients of transformers, exact round trips, refusals."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file

import lclm
from lclm.errors import LclmError
from lclm.hub.hf_config import config_from_hf, config_to_hf
from lclm.hub.names import gguf_names
from lclm.models.decoder import Decoder, unembed
from lclm.models.presets import PRESETS, preset
from lclm.tree import flatten

FOLDERS = ("mamba2", "mamba2_groups", "mamba2_limit")


def golden(name):
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return dict(arrays)


def near(found, expected):
    return np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_transformers():
    lm, expected = lclm.load(GOLDEN / "mamba2_groups"), golden("mamba2_groups")
    tokens = jnp.asarray(expected["tokens"])

    def loss(params):
        hidden, _ = Decoder(lm.config).apply({"params": params}, tokens)
        logp = jax.nn.log_softmax(unembed(lm.config, params, hidden)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], 2))

    value, slope = jax.jit(jax.value_and_grad(loss))(lm.params)
    assert near(value, expected["loss"])
    mixer = slope["layers_0"]["mamba2"]
    assert near(mixer["a_log"], expected["grad_a_log"])
    assert near(mixer["dt_bias"], expected["grad_dt_bias"])
    assert near(mixer["conv"]["weight"], expected["grad_conv"])


def test_reading_in_chunks_predicts_as_transformers_does_at_once():
    lm, expected = lclm.load(GOLDEN / "mamba2_limit"), golden("mamba2_limit")
    logits = expected["logits"][0]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    row = expected["tokens"][0]
    losses = -logp[np.arange(len(row) - 1), row[1:]]
    assert near(lm.nll(row[None], chunk=3)[0], losses)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_folder_holds_the_same_bytes(name, tmp_path):
    lclm.load(GOLDEN / name).save(tmp_path)
    old = load_file(GOLDEN / name / "model.safetensors")
    new = load_file(tmp_path / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[key], new[key]) for key in old)
    kept, made = (
        json.loads((folder / "config.json").read_text())
        for folder in (GOLDEN / name, tmp_path)
    )
    assert {key: kept[key] for key in made} == made


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("mamba2-")])
def test_a_preset_survives_its_config_json(name):
    table = json.loads(json.dumps(config_to_hf(preset(name))))
    assert config_from_hf(table) == preset(name)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_heads": 4}, "num_heads x head_dim is 32 but expand x hidden_size is 64"),
        ({"intermediate_size": 48}, "intermediate_size is 48"),
        ({"n_groups": 3}, "8 Mamba-2 heads over 3 groups"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"time_step_limit": [0.1]}, "time_step_limit is"),
        ({"time_step_limit": [0.3, 0.1]}, "time_step_limit is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"expnd": 2}, "unknown key 'expnd'"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(change, text):
    table = json.loads((GOLDEN / "mamba2" / "config.json").read_text()) | change
    with pytest.raises(LclmError, match=text):
        config_from_hf(table)


def test_missing_and_extra_tensors_are_all_listed(hf_folder):
    folder = hf_folder("mamba2")
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | {"use_bias": True}))
    with pytest.raises(LclmError) as caught:
        lclm.load(folder)
    for layer in (0, 1):
        assert f"backbone.layers.{layer}.mixer.in_proj.bias" in str(caught.value)


def write_gguf(path, lm, heads=None):
    """The model as llama.cpp's converter stores it; gives the stored tensors."""
    config, spec = lm.config, lm.config.layers[0].mixer
    names, stored = gguf_names(config), {}
    writer = gguf.GGUFWriter(path, "mamba2")
    writer.add_block_count(len(config.layers))
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_layer_norm_rms_eps(config.norm.eps)
    writer.add_ssm_conv_kernel(spec.conv)
    writer.add_ssm_inner_size(spec.inner)
    writer.add_ssm_state_size(spec.state)
    writer.add_ssm_time_step_rank(heads or spec.heads)
    writer.add_ssm_group_count(spec.groups)
    for key, value in flatten(lm.params).items():
        value = np.asarray(value)
        if key.endswith("a_log"):
            value = -np.exp(value)[:, None]
        elif key.endswith("mamba2/d"):
            value = value[:, None]
        elif key.endswith("mamba2/norm/scale"):
            value = value.reshape(spec.groups, -1)
        elif key.endswith("conv/weight"):
            value = value.squeeze()
        stored[names[key]] = value
        writer.add_tensor(names[key], value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("name", ["mamba2", "mamba2_groups"])
def test_gguf_gives_the_weights_of_hugging_face(tmp_path, name):
    lm, path = lclm.load(GOLDEN / name), tmp_path / "m.gguf"
    stored = write_gguf(path, lm)
    read = lclm.load(path)
    mixer, other = (each.config.layers[0].mixer for each in (read, lm))
    assert dataclasses.replace(mixer, chunk=other.chunk) == other
    assert read.config.tied == lm.config.tied
    want = flatten(lm.params)
    for key, value in flatten(read.params).items():
        bound = 1e-6 if key.endswith("a_log") else 0
        np.testing.assert_allclose(value, want[key], atol=bound)
    known = set(gguf.TENSOR_NAMES.values())
    for tensor in stored:
        block = tensor.removesuffix(".weight").removesuffix(".bias")
        assert (
            block.replace("blk.0", "blk.{bid}").replace("blk.1", "blk.{bid}") in known
        )


def test_gguf_heads_that_do_not_divide_are_refused(tmp_path):
    lm, path = lclm.load(GOLDEN / "mamba2"), tmp_path / "m.gguf"
    write_gguf(path, lm, heads=7)
    with pytest.raises(LclmError, match=r"inner_size is 64, no multiple .* 7"):
        lclm.load(path)
