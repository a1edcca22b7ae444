"""Hugging Face `mamba2` folders: config.json both ways, and tensor names.

Source: `Mamba2Config` and `Mamba2ForCausalLM` of transformers 5.
"""

import math
from typing import Any

from lclm.config import LayerSpec, ModelConfig, NormSpec, Run
from lclm.errors import LclmError
from lclm.hub import hf_mamba
from lclm.hub.families import HfFamily
from lclm.hub.hf_config import HARMLESS, eos_ids
from lclm.hub.json_file import Keys
from lclm.specs import Mamba2Spec

# Keys that only initial values depend on, or that transformers itself never reads
# (its norm is behind the gate whatever `norm_before_gate` says).
UNREAD = frozenset(
    """time_step_scale time_step_min time_step_max time_step_init_scheme time_step_rank
    time_step_floor rescale_prenorm_residual norm_before_gate""".split()
)
EXPECTED = hf_mamba.EXPECTED | {"rms_norm": True}
MIXER = {
    "in/weight": "in_proj.weight",
    "in/bias": "in_proj.bias",
    "conv/weight": "conv1d.weight",
    "conv/bias": "conv1d.bias",
    "dt_bias": "dt_bias",
    "a_log": "A_log",
    "d": "D",
    "norm/scale": "norm.weight",
    "out/weight": "out_proj.weight",
    "out/bias": "out_proj.bias",
}


def config_from_hf(table: dict[str, Any], where: str) -> ModelConfig:
    """The Mamba-2 model of a config.json.

    Raises `LclmError` for a missing, mistyped or unknown key, or heads that do not
    make up the channels.
    """
    keys = Keys(table, where)
    keys.get("model_type", str)
    width = keys.count("hidden_size", 4096)
    norm = NormSpec(keys.get("layer_norm_epsilon", float, 1e-5))
    spec = Mamba2Spec(
        heads=keys.count("num_heads", 128),
        head_dim=keys.count("head_dim", 64),
        state=keys.count("state_size", 128),
        groups=keys.count("n_groups", 8),
        conv=keys.count("conv_kernel", 4),
        chunk=keys.count("chunk_size", 256),
        conv_bias=keys.get("use_conv_bias", bool, True),
        proj_bias=keys.get("use_bias", bool, False),
        step_limit=_limit(keys),
        norm_eps=norm.eps,
    )
    _check_inner(keys, spec, width)
    layer = LayerSpec(spec, None, norm)
    config = ModelConfig(
        family="mamba2",
        vocab=keys.count("vocab_size", 32768),
        width=width,
        stack=(Run((layer,), keys.count("num_hidden_layers", 64)),),
        context=hf_mamba.CONTEXT,
        norm=norm,
        tied=keys.get("tie_word_embeddings", bool, False),
        bos=keys.get("bos_token_id", int, None if "bos_token_id" in table else 0),
        eos=eos_ids({"eos_token_id": 2} | table, where),
        residual_float32=keys.get("residual_in_fp32", bool, True),
    )
    keys.used |= {"eos_token_id"}
    keys.finish(HARMLESS | UNREAD, EXPECTED)
    return config


def _check_inner(keys: Keys, spec: Mamba2Spec, width: int) -> None:
    """Channels are said up to three times, and must agree."""
    inner = keys.count("expand", 2) * width
    for name, value in (
        ("num_heads x head_dim", spec.inner),
        ("intermediate_size", keys.count("intermediate_size", inner)),
    ):
        if value != inner:
            raise LclmError(
                f"{keys.where}: {name} is {value} but expand x hidden_size is {inner}; "
                "make them agree"
            )


def _limit(keys: Keys) -> tuple[float, float]:
    """`time_step_limit`: two numbers; transformers 5 writes infinity as a table."""
    stored = keys.get("time_step_limit", list, [0.0, math.inf])
    found = []
    for value in stored:
        if isinstance(value, dict) and value.get("__float__") == "Infinity":
            value = math.inf
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append(float(value))
    if len(stored) != 2 or len(found) != 2 or not 0 <= found[0] <= found[1]:
        raise LclmError(
            f"{keys.where}: time_step_limit is {stored}; expected two numbers, the "
            "smallest and the largest step size"
        )
    return found[0], found[1]


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a Mamba-2 model, in the spelling of transformers 5."""
    table = hf_mamba.shared_keys(config, Mamba2Spec, dtype)
    spec = config.layers[0].mixer
    low, high = spec.step_limit
    return table | {
        "architectures": ["Mamba2ForCausalLM"],
        "num_heads": spec.heads,
        "head_dim": spec.head_dim,
        "n_groups": spec.groups,
        "chunk_size": spec.chunk,
        "time_step_limit": [
            low,
            {"__float__": "Infinity"} if high == math.inf else high,
        ],
    }


def names(config: ModelConfig) -> dict[str, str]:
    """Our path -> tensor name."""
    return hf_mamba.backbone_names(config, "mamba2", MIXER)


FAMILY = HfFamily(config_from_hf, config_to_hf, names)
