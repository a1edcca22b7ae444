"""GGUF architecture `mamba2`: metadata, tensor names, and what llama.cpp changes.

Its converter stores A as -exp(A_log), A and D as columns, the norm of the gated output
by group, and drops the middle axis of the convolution. Heads stand under the key of
Mamba-1's step-size rank.
"""

from lclm.config import LayerSpec, ModelConfig, NormSpec, Run
from lclm.errors import LclmError
from lclm.hub import gguf_mamba
from lclm.hub.families import GgufFamily, layer_names
from lclm.hub.gguf_file import GgufFile
from lclm.hub.gguf_import import GgufKeys, special_tokens
from lclm.models.decoder import param_shapes
from lclm.specs import Mamba2Spec

SHARED = ("in/weight", "in/bias", "conv/weight", "conv/bias", "a_log", "d")
MIXER = {
    **{name: gguf_mamba.MIXER[name] for name in (*SHARED, "out/weight", "out/bias")},
    "dt_bias": "ssm_dt.bias",
    "norm/scale": "ssm_norm.weight",
}


def mixer(keys: GgufKeys, norm: NormSpec) -> Mamba2Spec:
    """The Mamba-2 mixer of a file; `LclmError` for heads that do not divide."""
    inner, heads = keys.whole("ssm.inner_size"), keys.whole("ssm.time_step_rank")
    if inner % heads:
        raise LclmError(
            f"{keys.file.path}: mamba2.ssm.inner_size is {inner}, no multiple of "
            f"mamba2.ssm.time_step_rank (the heads), {heads}: convert the model again"
        )
    return Mamba2Spec(
        heads=heads,
        head_dim=inner // heads,
        state=keys.whole("ssm.state_size"),
        groups=keys.whole("ssm.group_count"),
        conv=keys.whole("ssm.conv_kernel"),
        conv_bias="blk.0.ssm_conv1d.bias" in keys.file.tensors,
        proj_bias="blk.0.ssm_in.bias" in keys.file.tensors,
        norm_eps=norm.eps,
    )


def config(file: GgufFile) -> ModelConfig:
    """The Mamba-2 model that a file's metadata describes."""
    keys = GgufKeys(file, "mamba2")
    norm = NormSpec(keys.real("attention.layer_norm_rms_epsilon", 1e-5))
    bos, eos = special_tokens(file)
    return ModelConfig(
        family="mamba2",
        vocab=file.tensors["token_embd.weight"].shape[0],
        width=keys.whole("embedding_length"),
        stack=(Run((LayerSpec(mixer(keys, norm), None, norm),), keys.depth()),),
        context=keys.whole("context_length"),
        norm=norm,
        tied="output.weight" not in file.tensors,
        bos=bos,
        eos=eos,
        residual_float32=True,
    )


def names(model: ModelConfig) -> dict[str, str]:
    """Our path -> tensor name."""
    layer = {f"mamba2/{ours}": theirs for ours, theirs in MIXER.items()}
    layer["norm1/scale"] = "attn_norm.weight"
    return layer_names(param_shapes(model), gguf_mamba.TOP, layer, "blk.{}.")


def shape(path: str, ours: tuple[int, ...], model: ModelConfig) -> tuple[int, ...]:
    """The stored shape of a parameter."""
    if path.endswith(("a_log", "mamba2/d")):
        return (*ours, 1)
    if path.endswith("mamba2/norm/scale"):
        groups = model.layers[0].mixer.groups
        return groups, ours[0] // groups
    return gguf_mamba.shape(path, ours, model)


FAMILY = GgufFamily(config, names, shape, gguf_mamba.values)
