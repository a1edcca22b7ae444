"""LongGen and Infini folders: round trips, the base's tensor names, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import hub
from lclm.errors import LclmError
from lclm.hub.names import hf_names
from lclm.language_model import LanguageModel
from lclm.models.convert import convert
from lclm.models.decoder import init_params
from tests.tiny import lively, tiny_config

BASE = tiny_config(windows=(None,) * 3, qk_norm=True, qkv_bias=True, eos=(5, 7))
HYBRIDS = (
    "longgen:full=1,sinks=2,window=6",
    "longgen_blocks:full=1,block=4,local=2,stride=3",
    "infini:segment=8,rule=linear",
)


def model(hybrid: str, dtype=jnp.float32) -> LanguageModel:
    config = convert(BASE, hybrid)
    params = lively(init_params(config, jax.random.key(0)))
    return LanguageModel(config, jax.tree.map(lambda x: x.astype(dtype), params))


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_a_hybrid_survives_a_hugging_face_folder_bit_for_bit(hybrid, tmp_path):
    lm = model(hybrid, jnp.bfloat16)
    again = hub.load(lm.save(tmp_path / "out"))
    assert again.config == lm.config and hub.describe(tmp_path / "out") == lm.config
    assert jax.tree.structure(again.params) == jax.tree.structure(lm.params)
    for path, leaf in jax.tree.leaves_with_path(again.params):
        assert leaf.dtype == jnp.bfloat16, path
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_weights_keep_the_names_of_the_base_under_a_model_type_of_ours(
    hybrid, tmp_path
):
    lm = model(hybrid)
    theirs = set(hf_names(BASE, "qwen3").values())
    ours = set(hf_names(lm.config, lm.config.family).values())
    gates = {f"model.layers.{i}.self_attn.memory_gate" for i in range(3)}
    assert ours == theirs | (gates if lm.config.family == "infini" else set())
    table = json.loads((lm.save(tmp_path / "out") / "config.json").read_text())
    assert table["model_type"] == lm.config.family


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lclm": None}, "needs the description"),
        ({"model_type": "infini"}, "make them agree"),
        ({"rope_theta_scale": 2.0}, "unknown key 'rope_theta_scale'"),
        ({"lclm": {"family": "longgen", "wide": 3}}, "no option 'wide'"),
    ],
)
def test_a_folder_that_says_two_things_or_too_little_is_refused(
    change, words, tmp_path
):
    folder = model(HYBRIDS[0]).save(tmp_path / "out")
    table = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(LclmError, match=words):
        hub.load(folder)
