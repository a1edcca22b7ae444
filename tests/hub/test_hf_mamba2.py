"""Mamba-2 folders: gradients of transformers, exact round trips, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file

import lclm
from lclm.errors import LclmError
from lclm.hub.hf_config import config_from_hf, config_to_hf
from lclm.models.decoder import Decoder, unembed
from lclm.models.presets import PRESETS, preset

FOLDERS = ("mamba2", "mamba2_groups", "mamba2_limit")


def golden(name):
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return dict(arrays)


def near(found, expected):
    return np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(expected).max()


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
