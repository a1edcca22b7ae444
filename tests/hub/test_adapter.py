"""Laws of adapter folders: what was trained comes back on its base, and only there."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lclm.errors import LclmError
from lclm.hub.adapter import save_adapter, with_adapter
from lclm.hub.bundle import Bundle
from lclm.language_model import LanguageModel
from lclm.models.decoder import init_params
from lclm.models.lora import LoraSpec, adapters, merge
from lclm.ops.int8 import quantize_params
from lclm.ops.lora import LoraWeight
from lclm.tree import flatten, nest
from tests.tiny import lively, tiny_config, tokens

CONFIG = tiny_config()
PARAMS = lively(init_params(CONFIG, jax.random.key(0)))
SPEC = LoraSpec(rank=2, alpha=6.0)
BASE = Bundle(CONFIG, PARAMS, source="tiny")
TEXT = tokens(1, 12)


@pytest.fixture(scope="module")
def trained():
    """Adapters on attention, one norm of every layer and the final norm."""
    flat = flatten(PARAMS)
    own = adapters(flat, SPEC, jax.random.key(1))
    own |= {p: v for p, v in flat.items() if "norm1" in p or "final_norm" in p}
    return lively(own, 0.5)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(out, trained, config=CONFIG, spec=SPEC, base="tiny")
    return out


def logits(bundle: Bundle) -> np.ndarray:
    return np.asarray(LanguageModel(bundle.config, bundle.params).logits(TEXT))


def test_base_and_adapter_are_the_trained_model(folder, trained):
    flat = merge(flatten(PARAMS) | trained, SPEC)
    want = logits(Bundle(CONFIG, nest(flat)))
    got = logits(with_adapter(BASE, folder))
    np.testing.assert_array_equal(got, want)
    assert np.abs(got - logits(BASE)).max() > 0.1


def test_packed_weights_stay_packed_under_an_adapter(folder, trained):
    copy = jax.tree.map(lambda leaf: leaf, PARAMS)  # quantize_params empties its tree
    base = dataclasses.replace(BASE, params=quantize_params(copy, "int8"))
    made = with_adapter(base, folder)
    flat, held = flatten(made.params), flatten(base.params)
    kinds = {p for p, leaf in flat.items() if isinstance(leaf, LoraWeight)}
    assert kinds == {p.removesuffix("/lora_up") for p in trained if p.endswith("_up")}
    assert all(flat[p].base is held[p] for p in kinds)
    wide = {
        p: w.dequantize() if hasattr(w, "dequantize") else w for p, w in held.items()
    }
    near = logits(with_adapter(dataclasses.replace(BASE, params=nest(wide)), folder))
    np.testing.assert_allclose(logits(made), near, atol=0.02 * np.abs(near).max())


@pytest.mark.parametrize("packed", [False, True])
def test_trained_embeddings_leave_the_head_of_a_tied_model(trained, tmp_path, packed):
    tied = Bundle(dataclasses.replace(CONFIG, tied=True), PARAMS, source="tiny")
    own = trained | {"embed/table": 2 * PARAMS["embed"]["table"]}
    save_adapter(
        tmp_path / "a",
        own,
        config=dataclasses.replace(CONFIG, tied=False),
        spec=SPEC,
        base="tiny",
    )
    flat = merge(flatten(PARAMS) | own, SPEC)
    flat["head/weight"] = PARAMS["embed"]["table"]
    config = dataclasses.replace(CONFIG, tied=False)
    want = logits(Bundle(config, nest(flat)))
    if packed:
        copy = jax.tree.map(lambda leaf: leaf, PARAMS)
        tied = dataclasses.replace(tied, params=quantize_params(copy, "int8"))
    made = with_adapter(tied, tmp_path / "a")
    assert not made.config.tied
    near = 0.05 * np.abs(want).max() if packed else 0.0
    np.testing.assert_allclose(logits(made), want, rtol=0, atol=near)


def test_names_and_settings_are_those_of_peft(folder):
    told = json.loads((folder / "adapter_config.json").read_text())
    assert told["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert told["modules_to_save"] == ["input_layernorm", "model.norm"]
    assert (told["r"], told["lora_alpha"], told["peft_type"]) == (2, 6.0, "LORA")
    found = load_file(folder / "adapter_model.safetensors")
    head = "base_model.model.model.layers.1."
    assert found[head + "self_attn.q_proj.lora_A.weight"].shape == (2, 32)
    assert found[head + "self_attn.k_proj.lora_B.weight"].shape == (16, 2)
    assert found[head + "input_layernorm.weight"].shape == (32,)
    assert found["base_model.model.model.norm.weight"].shape == (32,)
    assert len(found) == 2 * 4 * 2 + 3


def test_the_rotary_embedding_of_the_training_comes_with_the_adapter(trained, tmp_path):
    rope = dataclasses.replace(CONFIG.layers[0].mixer.rope, kind="linear", factor=4.0)
    longer = dataclasses.replace(tiny_config(rope=rope), context=256)
    save_adapter(tmp_path / "a", trained, config=longer, spec=SPEC, base="tiny")
    made = with_adapter(BASE, tmp_path / "a")
    assert made.config == longer


@pytest.mark.parametrize("with_base", [True, False])
def test_an_adapter_of_another_base_is_refused(trained, tmp_path, with_base):
    save_adapter(tmp_path / "a", trained, config=CONFIG, spec=SPEC, base="tiny")
    if not with_base:
        (tmp_path / "a" / "base.json").unlink()
    config = tiny_config(windows=(None,))
    other = Bundle(config, init_params(config, jax.random.key(0)), source="other")
    with pytest.raises(LclmError, match="'tiny'"):
        with_adapter(other, tmp_path / "a")


def test_a_folder_without_an_adapter_or_with_half_of_one_is_refused(folder, tmp_path):
    with pytest.raises(LclmError, match="no adapter at"):
        with_adapter(BASE, tmp_path)
    for name in ("adapter_config.json", "base.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:200])
    with pytest.raises(LclmError, match="cannot be read"):
        with_adapter(BASE, tmp_path)
