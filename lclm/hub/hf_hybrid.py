"""LongGen and Infini-attention folders: the base model's tensors, our own config.json.

Tensors have the names that Hugging Face gives those of Llama and its kin. No
`model_type` of transformers computes such layers, and read as one of its own they
would silently see everything: config.json names ours, which transformers refuses, and
holds the description of the model under "lclm".
"""

from typing import Any

from lclm.config import ModelConfig, from_dict, to_dict
from lclm.errors import LclmError
from lclm.hub.families import HfFamily, layer_names
from lclm.hub.hf_config import HARMLESS
from lclm.hub.json_file import Keys
from lclm.hub.names import HF_TABLES
from lclm.models.decoder import param_shapes

SECTION = "lclm"
ARCHITECTURES = {"longgen": "LongGenForCausalLM", "infini": "InfiniForCausalLM"}
TOP = {
    "embed/table": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/weight": "lm_head.weight",
}
LAYER = {
    f"{ours.replace('attn/', mixer)}/{leaf}": f"{theirs}.{name}"
    for mixer in ("attn/", "infini/")
    for ours, theirs in HF_TABLES["qwen3"].items()
    for leaf, name in (("weight", "weight"), ("scale", "weight"), ("bias", "bias"))
} | {"infini/gate": "self_attn.memory_gate"}


def config_from_hf(table: dict[str, Any], where: str) -> ModelConfig:
    """The model under "lclm"; `LclmError` where it is missing or does not fit."""
    keys = Keys(table, where)
    family, section = keys.get("model_type", str), keys.get(SECTION, dict)
    if section is None:
        raise LclmError(
            f"{where}: model_type {family!r} needs the description of the model under "
            f"{SECTION!r}, as lm.save writes it"
        )
    config = from_dict(ModelConfig, section, f"{where}: {SECTION}.")
    if config.family != family:
        raise LclmError(
            f"{where}: model_type is {family!r} and {SECTION}.family "
            f"{config.family!r}; make them agree"
        )
    keys.finish(HARMLESS, {})
    return config


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A config.json that only lclm reads."""
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "dtype": dtype,
        SECTION: to_dict(config),
    }


def names(config: ModelConfig) -> dict[str, str]:
    """Our path -> tensor name."""
    return layer_names(param_shapes(config), TOP, LAYER, "model.layers.{}.")


FAMILY = HfFamily(config_from_hf, config_to_hf, names)
