"""GGUF architecture `jamba`: metadata, tensor names, experts in stacks as we hold them.

Layers with key-value heads attend, the others are Mamba (`gguf_mamba`); layers with a
router are mixtures of experts. Queries and keys are not interleaved: nothing rotates.
"""

from typing import Any

from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    find_runs,
)
from lclm.errors import LclmError
from lclm.hub import gguf_mamba
from lclm.hub.families import GgufFamily, layer_names
from lclm.hub.gguf_file import GgufFile
from lclm.hub.gguf_import import GgufKeys, special_tokens
from lclm.models.decoder import param_shapes
from lclm.specs import MoeSpec

LAYER = {
    "norm1/scale": "attn_norm.weight",
    "norm2/scale": "ffn_norm.weight",
    **{f"attn/{n}/weight": f"attn_{n}.weight" for n in "qkv"},
    "attn/o/weight": "attn_output.weight",
    **{f"mamba/{ours}": theirs for ours, theirs in gguf_mamba.MIXER.items()},
    **{f"mlp/{n}/weight": f"ffn_{n}.weight" for n in ("gate", "up", "down")},
    **{f"mlp/experts/{n}": f"ffn_{n}_exps.weight" for n in ("gate", "up", "down")},
    "mlp/router/weight": "ffn_gate_inp.weight",
}


def config(file: GgufFile) -> ModelConfig:
    """The Jamba model that a file's metadata describes."""
    keys = GgufKeys(file, "jamba")
    depth, width = keys.depth(), keys.whole("embedding_length")
    norm = NormSpec(keys.real("attention.layer_norm_rms_epsilon", 1e-6))
    mamba = gguf_mamba.mixer(keys, inner_norms=True, norm_eps=norm.eps)
    heads, hidden = (
        keys.whole("attention.head_count"),
        keys.whole("feed_forward_length"),
    )
    dense, experts = MlpSpec(hidden), _experts(keys, hidden)
    layers = tuple(
        LayerSpec(
            AttentionSpec(heads, kv, width // heads, rope=None) if kv else mamba,
            experts if f"blk.{i}.ffn_gate_inp.weight" in file.tensors else dense,
            norm,
        )
        for i, kv in enumerate(_kv_heads(keys, depth))
    )
    bos, eos = special_tokens(file)
    return ModelConfig(
        family="jamba",
        vocab=file.tensors["token_embd.weight"].shape[0],
        width=width,
        stack=find_runs(layers),
        context=keys.whole("context_length"),
        norm=norm,
        tied="output.weight" not in file.tensors,
        bos=bos,
        eos=eos,
    )


def _experts(keys: GgufKeys, hidden: int) -> MoeSpec | None:
    if not any(name.endswith("ffn_gate_inp.weight") for name in keys.file.tensors):
        return None
    return MoeSpec(hidden, keys.whole("expert_count"), keys.whole("expert_used_count"))


def _kv_heads(keys: GgufKeys, depth: int) -> list[int]:
    """Key-value heads of every layer; none where a layer does not attend."""
    found: Any = keys.maybe("attention.head_count_kv", list)
    good = found is not None and len(found) == depth
    if not good or not all(isinstance(n, int) and n >= 0 for n in found):
        raise LclmError(
            f"{keys.file.path}: jamba.attention.head_count_kv is {found!r}; a Jamba "
            f"file lists one number for each of its {depth} layers, 0 for Mamba"
        )
    return found


def names(model: ModelConfig) -> dict[str, str]:
    """Our path -> tensor name."""
    return layer_names(param_shapes(model), gguf_mamba.TOP, LAYER, "blk.{}.")


FAMILY = GgufFamily(config, names, gguf_mamba.shape, gguf_mamba.values)
