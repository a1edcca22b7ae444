"""Megalodon folders: a config.json, and tensors under the released names.

The authors' release (XuezheMax/megalodon) has a state dictionary but no config.json;
its keys here are those of `megalodon-jax`.
"""

import dataclasses
import math
from typing import Any

from lclm.config import ModelConfig, TimestepNormSpec
from lclm.errors import LclmError
from lclm.hub.families import HfFamily, layer_names
from lclm.hub.hf_config import HARMLESS, eos_ids, eos_key
from lclm.hub.json_file import Keys
from lclm.models.decoder import param_shapes
from lclm.models.megalodon_presets import CONTEXT, megalodon
from lclm.specs import FfnSpec, MegalodonSpec

# Keys of training and of how a program computes; none changes what the model is.
TRAINING = frozenset(
    """dropout attention_dropout hidden_dropout attention_dropout_mode init_mode
    use_checkpoint use_associative_segment_scan pad_token_id""".split()
)
EXPECTED = {"norm_affine": True, "attention_window": None, "output_size": -1}
TOP = {
    "embed/table": "embed.weight",
    "final_norm/scale": "output.final_norm.weight",
    "final_norm/bias": "output.final_norm.bias",
    "head/weight": "output.output.weight",
}
MIXER = {
    "norm/scale": "timenorm.weight",
    "norm/bias": "timenorm.bias",
    "rms_scale": "rmsnorm.weight",
    "gamma": "gamma",
    "beta": "beta",
    **{f"cema/{n}": f"cema.{n}" for n in "alpha delta theta gamma omega".split()},
    **{f"{n}/{k}": f"w{n}.{k}" for n in "v z r h1".split() for k in ("weight", "bias")},
    "h2/weight": "wh2.weight",
}
FFN = {f"fc{n}/weight": f"fc{n}.weight" for n in (1, 2, 3)} | {"alpha": "alpha"}
LAYER = (
    {f"megalodon/{ours}": f"mega.{theirs}" for ours, theirs in MIXER.items()}
    | {f"mlp/{ours}": f"nffn.{theirs}" for ours, theirs in FFN.items()}
    | {"norm2/scale": "nffn.norm.weight", "norm2/bias": "nffn.norm.bias"}
)


def config_from_hf(table: dict[str, Any], where: str) -> ModelConfig:
    """The Megalodon of a config.json; `LclmError` for keys that do not fit."""
    keys = Keys(table, where)
    keys.get("model_type", str)
    theta = 10000.0 if table.get("rope_base") is None else None
    mixer = MegalodonSpec(
        heads=keys.count("num_heads", 1),
        z=keys.count("z_dim", 256),
        value=keys.count("value_dim", 2048),
        chunk=keys.count("chunk_size", 2048),
        order=keys.count("cema_ndim", 16),
        norm_groups=keys.count("norm_num_groups", 32),
        theta=keys.get("rope_base", float) if theta is None else theta,
        eps=keys.get("norm_eps", float, 1e-5),
    )
    ffn = FfnSpec(
        keys.count("ffn_hidden_dim", 2560),
        gated=keys.get("swiglu", bool, False),
        rescale=keys.get("rescale_nffn", bool, False),
    )
    config = megalodon(
        keys.count("model_dim", 1024),
        keys.count("num_layers", 12),
        mixer,
        ffn,
        vocab=keys.count("vocab_size", 32000),
        tied=keys.get("share_emb", bool, False),
        scaled=keys.get("scale_emb", bool, False),
    )
    config = dataclasses.replace(
        config,
        context=keys.count("max_position_embeddings", CONTEXT),
        bos=keys.get("bos_token_id", int, 1),
        eos=eos_ids({"eos_token_id": 2} | table, where),
    )
    keys.used |= {"eos_token_id", "rope_base"}
    keys.finish(HARMLESS | TRAINING, EXPECTED)
    return config


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a Megalodon model."""
    layer = config.layers[0]
    mixer, ffn = layer.mixer, layer.mlp
    known = isinstance(mixer, MegalodonSpec) and isinstance(ffn, FfnSpec)
    scaled = config.embed_scale is not None
    if known:
        like = megalodon(
            config.width,
            len(config.layers),
            mixer,
            ffn,
            vocab=config.vocab,
            tied=config.tied,
            scaled=scaled,
        )
        free = {"context": config.context, "bos": config.bos, "eos": config.eos}
        known = dataclasses.replace(like, **free).layers == config.layers
    norm = config.norm
    if (
        not known
        or norm != TimestepNormSpec(mixer.norm_groups, mixer.eps)
        or (scaled and not math.isclose(config.embed_scale, math.sqrt(config.width)))
    ):
        raise LclmError(
            "a megalodon config.json has equal Megalodon layers in the two-hop wiring, "
            "a final timestep norm with their groups, and embeddings scaled by "
            f"sqrt(width) or not at all; this model has {layer}, {norm}, "
            f"embed_scale {config.embed_scale}. Save it with format='orbax'"
        )
    return {
        "architectures": ["MegalodonForCausalLM"],
        "model_type": "megalodon",
        "vocab_size": config.vocab,
        "model_dim": config.width,
        "num_layers": len(config.layers),
        "num_heads": mixer.heads,
        "z_dim": mixer.z,
        "value_dim": mixer.value,
        "ffn_hidden_dim": ffn.width,
        "cema_ndim": mixer.order,
        "chunk_size": mixer.chunk,
        "norm_num_groups": mixer.norm_groups,
        "norm_eps": mixer.eps,
        "rope_base": mixer.theta,
        "swiglu": ffn.gated,
        "rescale_nffn": ffn.rescale,
        "scale_emb": scaled,
        "share_emb": config.tied,
        "max_position_embeddings": config.context,
        "bos_token_id": config.bos,
        "eos_token_id": eos_key(config.eos),
        "dtype": dtype,
    }


def names(config: ModelConfig) -> dict[str, str]:
    """Our path -> released tensor name."""
    return layer_names(param_shapes(config), TOP, LAYER, "layers.{}.")


FAMILY = HfFamily(config_from_hf, config_to_hf, names)
