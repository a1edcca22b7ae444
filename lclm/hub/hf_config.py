"""Hugging Face `config.json` to `ModelConfig` and back.

A key that nobody understands is refused, and an export that would not read back as the
same model is refused too. Sources: the configuration classes of transformers 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
    find_runs,
)
from lclm.errors import LclmError, unknown
from lclm.hub.families import HF
from lclm.hub.json_file import Keys
from lclm.ops.rope_hf import rope_from_hf, rope_to_hf

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What a `model_type` means where its config.json is silent."""

    architecture: str
    context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    tied: bool = False
    qkv_bias: bool | None = None  # None: `attention_bias`, which the output shares
    qk_norm: bool = False
    gemma: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM", 2048),
    "mistral": Family("MistralForCausalLM", 131072, 8, window=4096, qkv_bias=False),
    "qwen2": Family("Qwen2ForCausalLM", 32768, 32, window=4096, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", 32768, 32, 128, window=4096, qk_norm=True),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        131072,
        4,
        256,
        window=4096,
        tied=True,
        qk_norm=True,
        gemma=True,
    ),
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_HF_ACTIVATION = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
HARMLESS = frozenset(
    """architectures model_type torch_dtype dtype transformers_version use_cache
    initializer_range attention_dropout pad_token_id pretraining_tp _name_or_path
    output_attentions output_hidden_states return_dict chunk_size_feed_forward
    id2label label2id problem_type task_specific_params finetuning_task
    _attn_implementation attn_implementation _attn_implementation_autoset
    cache_implementation tokenizer_class prefix sep_token_id decoder_start_token_id
    max_length min_length gradient_checkpointing unsloth_version unsloth_fixed
    transformers.js_config torchscript use_bfloat16 tf_legacy_loss
    rope_parameters rope_scaling rope_theta rope_local_base_freq
    partial_rotary_factor original_max_position_embeddings""".split()
)
EXPECTED = {
    "rope_interleaved": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": None,
    "pruned_heads": {},
}


def config_from_hf(table: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The model that a config.json describes.

    Raises `LclmError` for an unknown `model_type`, a missing or mistyped key, or a key
    that is not known and not null.
    """
    keys = Keys(table, where)
    name = keys.get("model_type", str)
    if name in HF.entries:
        return HF[name].config_from_hf(table, where)
    if name is None and "ssm_cfg" in table:
        raise LclmError(
            f"{where} is in the form of the state-spaces repository, not of Hugging "
            "Face: take the same model in the other form, for instance "
            "state-spaces/mamba-130m-hf for mamba-130m"
        )
    if name not in FAMILIES:
        raise unknown(f"model_type in {where}:", name, [*FAMILIES, *HF])
    family = FAMILIES[name]
    depth, width = keys.count("num_hidden_layers"), keys.count("hidden_size")
    eps = keys.get("rms_norm_eps", float, 1e-6)
    norm = NormSpec(eps, 1.0 if family.gemma else 0.0)
    context = keys.count("max_position_embeddings", family.context)
    windows = _windows(keys, name, depth)
    ropes = rope_from_hf(table | {"max_position_embeddings": context})
    mlp = _mlp(keys, family)
    layers = {
        (window, kind): LayerSpec(
            _attention(keys, family, window=window, rope=_pick(ropes, kind, where)),
            mlp,
            norm,
            post_norms=family.gemma,
        )
        for window, kind in dict.fromkeys(windows)
    }
    config = ModelConfig(
        family=name,
        vocab=keys.count("vocab_size"),
        width=width,
        stack=find_runs(tuple(layers[w] for w in windows)),
        context=context,
        norm=norm,
        tied=keys.get("tie_word_embeddings", bool, family.tied),
        embed_scale=width**0.5 if family.gemma else None,
        final_softcap=keys.get("final_logit_softcapping", float)
        if family.gemma
        else None,
        bos=keys.get("bos_token_id", int),
        eos=eos_ids(table, where),
    )
    keys.used |= {"eos_token_id"}
    keys.finish(HARMLESS, EXPECTED)
    return config


def eos_ids(table: dict[str, Any], where: str) -> tuple[int, ...]:
    """`eos_token_id`: a number, a list of numbers, or nothing."""
    value = table.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise LclmError(f"{where}: eos_token_id is {value!r}; expected numbers")
    return tuple(ids)


def _mlp(keys: Keys, family: Family) -> MlpSpec:
    key = "hidden_activation" if family.gemma else "hidden_act"
    name = keys.get(key, str, "gelu_pytorch_tanh" if family.gemma else "silu")
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    bias = keys.get("mlp_bias", bool, False) if _llama(family) else False
    return MlpSpec(keys.count("intermediate_size"), ACTIVATIONS[name], bias)


def _llama(family: Family) -> bool:
    return family.architecture.startswith("Llama")


def _attention(
    keys: Keys, family: Family, *, window: int | None, rope: RopeSpec | None
) -> AttentionSpec:
    heads, width = keys.count("num_attention_heads"), keys.count("hidden_size")
    bias = family.qkv_bias
    shared = keys.get("attention_bias", bool, False) if bias is None else False
    head_dim = keys.get("head_dim", int, family.head_dim)
    if head_dim is None and width % heads:
        raise LclmError(
            f"{keys.where}: hidden_size {width} over {heads} heads leaves a rest; set "
            "head_dim"
        )
    head_dim = width // heads if head_dim is None else keys.count("head_dim", head_dim)
    scalar = keys.get("query_pre_attn_scalar", float, 256.0) if family.gemma else None
    if scalar is not None and scalar <= 0:
        raise LclmError(f"{keys.where}: query_pre_attn_scalar is {scalar}; it is > 0")
    same = scalar is None or scalar == head_dim
    return AttentionSpec(
        heads=heads,
        kv_heads=keys.count("num_key_value_heads", family.kv_heads or heads),
        head_dim=head_dim,
        rope=rope,
        window=window,
        scale=None if same else scalar**-0.5,
        qkv_bias=shared if bias is None else bias,
        out_bias=shared,
        qk_norm=family.qk_norm,
    )


def _pick(ropes: Any, kind: str, where: str) -> RopeSpec | None:
    if not isinstance(ropes, Mapping):
        return ropes
    if kind not in ropes:
        raise unknown(f"layer type without rope_parameters in {where}:", kind, ropes)
    return ropes[kind]


def _windows(keys: Keys, name: str, depth: int) -> list[tuple[int | None, str]]:
    """(window, layer type) of every layer; a window counts the query itself."""
    family = FAMILIES[name]
    if name == "llama":
        return [(None, FULL)] * depth
    null = "sliding_window" in keys.table and keys.table["sliding_window"] is None
    window = None if null else keys.count("sliding_window", family.window)
    keys.used.add("sliding_window")
    if name == "mistral":
        return [(window, FULL)] * depth
    if family.gemma:
        period = keys.count("_sliding_window_pattern", 6)
        period = keys.count("sliding_window_pattern", period)
        kinds = [SLIDING if (i + 1) % period else FULL for i in range(depth)]
    else:
        if not keys.get("use_sliding_window", bool, False):
            window = None
        first = keys.get("max_window_layers", int, 28)
        slides = window is not None
        kinds = [SLIDING if slides and i >= first else FULL for i in range(depth)]
    listed = keys.get("layer_types", list)
    if listed is not None:
        kinds = _listed(listed, depth, keys.where)
    return [(window if kind == SLIDING else None, kind) for kind in kinds]


def _listed(kinds: list[Any], depth: int, where: str) -> list[str]:
    if len(kinds) != depth:
        raise LclmError(
            f"{where}: layer_types names {len(kinds)} layers, num_hidden_layers is "
            f"{depth}"
        )
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise unknown(f"layer type in {where}:", kind, (FULL, SLIDING))
    return kinds


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a model, in the spelling of transformers 5.

    Raises `LclmError` where the family has no key for something the model does.
    """
    if config.family in HF.entries:
        table = HF[config.family].config_to_hf(config, dtype)
    elif config.family in FAMILIES:
        table = _attention_keys(config, dtype)
    else:
        raise unknown("Hugging Face family", config.family, [*FAMILIES, *HF])
    if config_from_hf(table) != config:
        raise LclmError(
            f"this {config.family} model cannot be written as a Hugging Face "
            "config.json: a layer differs from what the family can say (RoPE angle "
            "mode, windows or widths per layer); save it with format='orbax'"
        )
    return table


def eos_key(eos: tuple[int, ...]) -> int | list[int] | None:
    """The value of `eos_token_id`: one number, several, or nothing."""
    return eos[0] if len(eos) == 1 else list(eos) or None


def _attention_keys(config: ModelConfig, dtype: str) -> dict[str, Any]:
    family, layers = FAMILIES[config.family], config.layers
    first = layers[0]
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": first.mlp.width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": first.mixer.heads,
        "num_key_value_heads": first.mixer.kv_heads,
        "head_dim": first.mixer.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos,
        "eos_token_id": eos_key(config.eos),
        "dtype": dtype,
        **_family_keys(config, family),
    }


def _family_keys(config: ModelConfig, family: Family) -> dict[str, Any]:
    layers = config.layers
    first = layers[0]
    act = _HF_ACTIVATION[first.mlp.activation]
    table: dict[str, Any] = {
        "hidden_activation" if family.gemma else "hidden_act": act,
        "rope_parameters": _rope_keys(config, family),
    }
    if family.qkv_bias is None:
        table["attention_bias"] = first.mixer.out_bias
    if _llama(family):
        return table | {"mlp_bias": first.mlp.bias}
    windows = [s.mixer.window for s in layers]
    window = next((w for w in windows if w is not None), None)
    table["sliding_window"] = window
    if config.family == "mistral":
        return table
    table["layer_types"] = _kinds(config)
    if not family.gemma:
        return table | {"use_sliding_window": window is not None}
    scale = first.mixer.scale
    table["query_pre_attn_scalar"] = (
        first.mixer.head_dim if scale is None else _tidy(scale**-2)
    )
    return table | {"final_logit_softcapping": config.final_softcap}


def _tidy(value: float) -> float:
    """The whole number that a square root and its inverse blurred, if there is one."""
    return float(round(value)) if abs(value - round(value)) < 1e-6 * value else value


def _kinds(config: ModelConfig) -> list[str]:
    return [FULL if s.mixer.window is None else SLIDING for s in config.layers]


def _rope_keys(config: ModelConfig, family: Family) -> dict[str, Any]:
    ropes = {
        kind: spec.mixer.rope
        for kind, spec in zip(_kinds(config), config.layers, strict=True)
    }
    if family.gemma:
        return rope_to_hf(ropes)
    rope = config.layers[0].mixer.rope
    if rope is None:
        raise LclmError(f"a {config.family} model without RoPE has no config.json")
    return rope_to_hf(rope)
