"""The parameter tree of a model and what each file format calls its entries.

Weights are [out, in] here and in every format, so a name is all that changes.
"""

from lclm.config import ModelConfig
from lclm.errors import unknown
from lclm.hub.families import GGUF, HF, Names
from lclm.models.decoder import param_shapes

_HF_LAYER = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
_HF_GEMMA3 = _HF_LAYER | {
    "post_norm1": "post_attention_layernorm",
    "norm2": "pre_feedforward_layernorm",
    "post_norm2": "post_feedforward_layernorm",
}
HF_TABLES: dict[str, dict[str, str]] = {
    "llama": _HF_LAYER,
    "mistral": _HF_LAYER,
    "qwen2": _HF_LAYER,
    "qwen3": _HF_LAYER,
    "gemma3_text": _HF_GEMMA3,
}
_GGUF_LAYER = {
    "attn/q": "attn_q",
    "attn/k": "attn_k",
    "attn/v": "attn_v",
    "attn/o": "attn_output",
    "attn/q_norm": "attn_q_norm",
    "attn/k_norm": "attn_k_norm",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "mlp/router": "ffn_gate_inp",
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
    "post_norm1": "post_attention_norm",
    "post_norm2": "post_ffw_norm",
}
_TOP_HF = {
    "embed/table": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/weight": "lm_head.weight",
}
_TOP_GGUF = {
    "embed/table": "token_embd.weight",
    "final_norm/scale": "output_norm.weight",
    "head/weight": "output.weight",
}
_EXPERTS = {f"mlp/experts/{n}": f"ffn_{n}_exps.weight" for n in ("gate", "up", "down")}


def hf_names(config: ModelConfig, family: str) -> Names:
    """Our path -> Hugging Face tensor name, a bijection over the model's parameters.

    A tuple of names stands for a stack. Raises `LclmError` for a family without a
    table.
    """
    if family in HF.entries:
        return HF[family].names(config)
    if family not in HF_TABLES:
        raise unknown("Hugging Face family", family, [*HF_TABLES, *HF])
    table = HF_TABLES[family]
    return {
        path: _TOP_HF.get(path) or _layer_name(path, table, "model.layers.{}.")
        for path in param_shapes(config)
    }


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Our path -> GGUF tensor name."""
    if config.family in GGUF.entries:
        return GGUF[config.family].names(config)
    return {
        path: _TOP_GGUF.get(path) or _layer_name(path, _GGUF_LAYER, "blk.{}.")
        for path in param_shapes(config)
    }


def _layer_name(path: str, table: dict[str, str], prefix: str) -> str:
    layer, _, rest = path.partition("/")
    index = layer.removeprefix("layers_")
    module, _, leaf = rest.rpartition("/")
    if table is _GGUF_LAYER and rest in _EXPERTS:
        return prefix.format(index) + _EXPERTS[rest]
    if module not in table:
        raise unknown("parameter for this file format", path, table)
    suffix = "bias" if leaf == "bias" else "weight"
    return f"{prefix.format(index)}{table[module]}.{suffix}"
