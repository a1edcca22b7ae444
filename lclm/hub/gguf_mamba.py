"""GGUF architecture `mamba`: metadata, tensor names, and what llama.cpp changes.

Its converter stores A as -exp(A_log) and drops the middle axis of the convolution.
"""

from typing import Any

import numpy as np

from lclm.config import LayerSpec, ModelConfig, NormSpec, Run
from lclm.hub.families import GgufFamily, layer_names
from lclm.hub.gguf_file import GgufFile
from lclm.hub.gguf_import import GgufKeys, special_tokens
from lclm.models.decoder import param_shapes
from lclm.specs import MambaSpec

MIXER = {
    "in/weight": "ssm_in.weight",
    "in/bias": "ssm_in.bias",
    "conv/weight": "ssm_conv1d.weight",
    "conv/bias": "ssm_conv1d.bias",
    "x/weight": "ssm_x.weight",
    "dt/weight": "ssm_dt.weight",
    "dt/bias": "ssm_dt.bias",
    "a_log": "ssm_a",
    "d": "ssm_d",
    "out/weight": "ssm_out.weight",
    "out/bias": "ssm_out.bias",
    "dt_norm/scale": "ssm_dt_norm.weight",
    "b_norm/scale": "ssm_b_norm.weight",
    "c_norm/scale": "ssm_c_norm.weight",
}
TOP = {
    "embed/table": "token_embd.weight",
    "final_norm/scale": "output_norm.weight",
    "head/weight": "output.weight",
}


def mixer(keys: GgufKeys, **more: Any) -> MambaSpec:
    """The Mamba-1 mixer of a file; `more` are fields its metadata does not name."""
    return MambaSpec(
        inner=keys.whole("ssm.inner_size"),
        rank=keys.whole("ssm.time_step_rank"),
        state=keys.whole("ssm.state_size"),
        conv=keys.whole("ssm.conv_kernel"),
        conv_bias="blk.0.ssm_conv1d.bias" in keys.file.tensors,
        proj_bias="blk.0.ssm_in.bias" in keys.file.tensors,
        **more,
    )


def config(file: GgufFile) -> ModelConfig:
    """The Mamba-1 model that a file's metadata describes."""
    keys = GgufKeys(file, "mamba")
    norm = NormSpec(keys.real("attention.layer_norm_rms_epsilon", 1e-5))
    spec = mixer(keys)
    bos, eos = special_tokens(file)
    return ModelConfig(
        family="mamba",
        vocab=file.tensors["token_embd.weight"].shape[0],
        width=keys.whole("embedding_length"),
        stack=(Run((LayerSpec(spec, None, norm),), keys.depth()),),
        context=keys.whole("context_length"),
        norm=norm,
        tied="output.weight" not in file.tensors,
        bos=bos,
        eos=eos,
        residual_float32=True,
    )


def names(model: ModelConfig) -> dict[str, str]:
    """Our path -> tensor name."""
    layer = {f"mamba/{ours}": theirs for ours, theirs in MIXER.items()}
    layer["norm1/scale"] = "attn_norm.weight"
    return layer_names(param_shapes(model), TOP, layer, "blk.{}.")


def shape(path: str, ours: tuple[int, ...], model: ModelConfig) -> tuple[int, ...]:
    """The stored shape: convolutions without their middle axis."""
    return (ours[0], ours[2]) if path.endswith("conv/weight") else ours


def values(path: str, stored: np.ndarray) -> np.ndarray:
    """A_log from the stored A = -exp(A_log)."""
    return np.log(-stored) if path.endswith("a_log") else stored


FAMILY = GgufFamily(config, names, shape, values)
