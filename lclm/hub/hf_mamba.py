"""Hugging Face `mamba` folders: config.json both ways, and tensor names.

What `mamba2` folders share is here as well. Source: `MambaConfig` and
`MambaForCausalLM` of transformers 5, and the files of state-spaces/mamba, which spell
one tensor otherwise.
"""

import math
from typing import Any

from lclm.config import LayerSpec, ModelConfig, NormSpec, Run
from lclm.errors import LclmError
from lclm.hub.families import HfFamily, layer_names
from lclm.hub.hf_config import HARMLESS, eos_ids, eos_key
from lclm.hub.json_file import Keys
from lclm.models.decoder import param_shapes
from lclm.specs import MambaSpec

# The length the published models were trained with; no key holds it.
CONTEXT = 2048
# Keys that only initial values and PyTorch's choice of loop depend on.
INITIAL = frozenset(
    """time_step_scale time_step_min time_step_max time_step_init_scheme
    time_step_floor rescale_prenorm_residual use_mambapy use_associative_scan""".split()
)
EXPECTED = {
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
}
MIXER = {
    "in/weight": "in_proj.weight",
    "in/bias": "in_proj.bias",
    "conv/weight": "conv1d.weight",
    "conv/bias": "conv1d.bias",
    "x/weight": "x_proj.weight",
    "dt/weight": "dt_proj.weight",
    "dt/bias": "dt_proj.bias",
    "a_log": "A_log",
    "d": "D",
    "out/weight": "out_proj.weight",
    "out/bias": "out_proj.bias",
}
TOP = {
    "embed/table": "backbone.embeddings.weight",
    "final_norm/scale": "backbone.norm_f.weight",
    "head/weight": "lm_head.weight",
}


def config_from_hf(table: dict[str, Any], where: str) -> ModelConfig:
    """The Mamba-1 model of a config.json.

    Raises `LclmError` for a missing, mistyped or unknown key.
    """
    keys = Keys(table, where)
    keys.get("model_type", str)
    width, depth = keys.count("hidden_size", 768), keys.count("num_hidden_layers", 32)
    norm = NormSpec(keys.get("layer_norm_epsilon", float, 1e-5))
    spec = MambaSpec(
        inner=_inner(keys, width),
        rank=step_rank(keys, "time_step_rank", width),
        state=keys.count("state_size", 16),
        conv=keys.count("conv_kernel", 4),
        conv_bias=keys.get("use_conv_bias", bool, True),
        proj_bias=keys.get("use_bias", bool, False),
    )
    config = ModelConfig(
        family="mamba",
        vocab=keys.count("vocab_size", 50280),
        width=width,
        stack=(Run((LayerSpec(spec, None, norm),), depth),),
        context=CONTEXT,
        norm=norm,
        tied=keys.get("tie_word_embeddings", bool, True),
        bos=keys.get("bos_token_id", int, None if "bos_token_id" in table else 0),
        eos=eos_ids({"eos_token_id": 0} | table, where),
        residual_float32=keys.get("residual_in_fp32", bool, True),
    )
    keys.used |= {"eos_token_id"}
    keys.finish(HARMLESS | INITIAL, EXPECTED)
    return config


def _inner(keys: Keys, width: int) -> int:
    """Channels: `expand` times the width, which `intermediate_size` must repeat."""
    inner = int(keys.get("expand", float, 2.0) * width)
    stated = keys.count("intermediate_size", inner)
    if stated != inner:
        raise LclmError(
            f"{keys.where}: intermediate_size is {stated} but expand x hidden_size is "
            f"{inner}; make them agree"
        )
    return inner


def step_rank(keys: Keys, name: str, width: int) -> int:
    """The rank of the step-size projection; "auto" is a sixteenth of the width."""
    if keys.table.get(name, "auto") == "auto":
        keys.used.add(name)
        return math.ceil(width / 16)
    return keys.count(name)


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a Mamba-1 model, in the spelling of transformers 5."""
    table = shared_keys(config, MambaSpec, dtype)
    spec = config.layers[0].mixer
    return table | {
        "architectures": ["MambaForCausalLM"],
        "intermediate_size": spec.inner,
        "time_step_rank": spec.rank,
    }


def shared_keys(config: ModelConfig, kind: type, dtype: str) -> dict[str, Any]:
    """What the two generations write alike; `LclmError` for layers of another `kind`.

    `kind` is the spec of the mixer: Mamba-1's or Mamba-2's.
    """
    spec = config.layers[0].mixer
    if not isinstance(spec, kind) or spec.inner % config.width:
        raise LclmError(
            f"a Hugging Face {config.family} config has layers of {kind.__name__} and "
            f"a whole multiple of the width {config.width}; the first layer is {spec}. "
            "Save it with format='orbax'"
        )
    return {
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.layers),
        "state_size": spec.state,
        "conv_kernel": spec.conv,
        "expand": spec.inner // config.width,
        "use_bias": spec.proj_bias,
        "use_conv_bias": spec.conv_bias,
        "layer_norm_epsilon": config.norm.eps,
        "residual_in_fp32": config.residual_float32,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos,
        "eos_token_id": eos_key(config.eos),
        "hidden_act": "silu",
        "dtype": dtype,
    }


def names(config: ModelConfig) -> dict[str, str]:
    """Our path -> tensor name."""
    return backbone_names(config, "mamba", MIXER)


def backbone_names(
    config: ModelConfig, module: str, mixer: dict[str, str]
) -> dict[str, str]:
    """Our path -> tensor name, where `mixer` names what our `module` holds."""
    layer = {f"{module}/{ours}": f"mixer.{theirs}" for ours, theirs in mixer.items()}
    layer["norm1/scale"] = "norm.weight"
    return layer_names(param_shapes(config), TOP, layer, "backbone.layers.{}.")


def rename(name: str) -> str:
    """The official files' `backbone.embedding` as transformers spells it."""
    return TOP["embed/table"] if name == "backbone.embedding.weight" else name


FAMILY = HfFamily(config_from_hf, config_to_hf, names, rename)
