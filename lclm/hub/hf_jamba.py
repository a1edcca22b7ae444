"""Hugging Face `jamba` and `mixtral` folders: config.json both ways, tensor names.

Source: `JambaConfig` and `MixtralConfig` of transformers 5. Files hold one tensor per
expert and matrix; we hold one stack per matrix.
"""

import math
from typing import Any

from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    Run,
    find_runs,
)
from lclm.errors import LclmError, unknown
from lclm.hub.families import HfFamily, Names, layer_names
from lclm.hub.hf_config import _HF_ACTIVATION, ACTIVATIONS, HARMLESS, eos_ids, eos_key
from lclm.hub.hf_mamba import MIXER, step_rank
from lclm.hub.json_file import Keys
from lclm.models.decoder import param_shapes
from lclm.models.jamba_presets import (
    ATTENTION_EVERY,
    EXPERTS_EVERY,
    every,
    jamba_layers,
)
from lclm.ops.rope_hf import rope_from_hf, rope_to_hf
from lclm.specs import MambaSpec, MoeSpec

# Training's and PyTorch's own choices; logits do not depend on them.
TRAINING = frozenset(
    """output_router_logits router_aux_loss_coef use_mamba_kernels use_mambapy
    use_associative_scan num_logits_to_keep calc_logits_for_entire_prompt
    auto_map""".split()
)
EXPECTED = {
    "router_jitter_noise": 0.0,
    "mamba_inner_layernorms": True,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
}
ATTENTION = {f"attn/{n}/weight": f"self_attn.{n}_proj.weight" for n in "qkvo"}
JAMBA_TOP = {
    "embed/table": "model.embed_tokens.weight",
    "final_norm/scale": "model.final_layernorm.weight",
    "head/weight": "lm_head.weight",
}
JAMBA_LAYER = {
    "norm1/scale": "input_layernorm.weight",
    "norm2/scale": "pre_ff_layernorm.weight",
    **ATTENTION,
    **{f"mamba/{ours}": f"mamba.{theirs}" for ours, theirs in MIXER.items()},
    **{
        f"mamba/{n}_norm/scale": f"mamba.{n}_layernorm.weight" for n in ("dt", "b", "c")
    },
    "mlp/router/weight": "feed_forward.router.weight",
}
for _name in ("gate", "up", "down"):
    JAMBA_LAYER |= {
        f"mlp/{_name}/weight": f"feed_forward.{_name}_proj.weight",
        f"mlp/experts/{_name}": f"feed_forward.experts.{{}}.{_name}_proj.weight",
    }
MIXTRAL_TOP = JAMBA_TOP | {"final_norm/scale": "model.norm.weight"}
MIXTRAL_LAYER = {
    "norm1/scale": "input_layernorm.weight",
    "norm2/scale": "post_attention_layernorm.weight",
    **ATTENTION,
    "mlp/router/weight": "block_sparse_moe.gate.weight",
    "mlp/experts/gate": "block_sparse_moe.experts.{}.w1.weight",
    "mlp/experts/down": "block_sparse_moe.experts.{}.w2.weight",
    "mlp/experts/up": "block_sparse_moe.experts.{}.w3.weight",
}


def jamba_from_hf(table: dict[str, Any], where: str) -> ModelConfig:
    """The Jamba model of a config.json.

    Raises `LclmError` for a missing, mistyped or unknown key, a period below 1 or an
    offset outside its period. Layers need not be whole periods.
    """
    keys = Keys(table, where)
    keys.get("model_type", str)
    norm = NormSpec(keys.get("rms_norm_eps", float, 1e-6))
    depth = keys.count("num_hidden_layers", 32)
    rules = {
        kind: (
            keys.count(f"{key}_layer_period", period),
            keys.get(f"{key}_layer_offset", int, offset),
        )
        for kind, key, (period, offset) in (
            ("attention", "attn", ATTENTION_EVERY),
            ("expert", "expert", EXPERTS_EVERY),
        )
    }
    places = {k: every(depth, *rule, what=f"{where}: {k}") for k, rule in rules.items()}
    mlp, experts = _feed_forwards(keys, "num_experts", 16)
    layers = jamba_layers(
        (_mamba(keys, norm), _attention(keys, 8)),
        (mlp, experts or mlp),
        attention=places["attention"],
        experts=places["expert"],
        norm=norm,
    )
    longest = max(8, math.lcm(rules["attention"][0], rules["expert"][0]))
    config = ModelConfig(
        "jamba",
        keys.count("vocab_size", 65536),
        keys.count("hidden_size", 4096),
        find_runs(layers, longest),
        keys.count("max_position_embeddings", 262144),
        norm,
        tied=keys.get("tie_word_embeddings", bool, False),
        **_special(keys),
    )
    keys.finish(HARMLESS | TRAINING, EXPECTED)
    return config


def mixtral_from_hf(table: dict[str, Any], where: str) -> ModelConfig:
    """The Mixtral model of a config.json.

    Raises `LclmError` for a missing, mistyped or unknown key.
    """
    keys = Keys(table, where)
    keys.get("model_type", str)
    norm = NormSpec(keys.get("rms_norm_eps", float, 1e-5))
    context = keys.count("max_position_embeddings", 131072)
    theta = {} if table.get("rope_parameters") else {"rope_theta": 1e6}
    rope = rope_from_hf(theta | table | {"max_position_embeddings": context})
    window = keys.get("sliding_window", int)
    attention = _attention(keys, 8, rope=rope, window=window)
    _, experts = _feed_forwards(keys, "num_local_experts", 8, renormalise=True)
    layer = LayerSpec(attention, experts, norm)
    config = ModelConfig(
        "mixtral",
        keys.count("vocab_size", 32000),
        keys.count("hidden_size", 4096),
        (Run((layer,), keys.count("num_hidden_layers", 32)),),
        context,
        norm,
        tied=keys.get("tie_word_embeddings", bool, False),
        **_special(keys),
    )
    keys.finish(HARMLESS | TRAINING, EXPECTED)
    return config


def _special(keys: Keys) -> dict[str, Any]:
    """Tokens that open and end a text; both classes have 1 and 2 where a file has no
    such key."""
    table = {"bos_token_id": 1, "eos_token_id": 2} | keys.table
    keys.used |= {"bos_token_id", "eos_token_id"}
    found = Keys(table, keys.where)
    return {"bos": found.get("bos_token_id", int), "eos": eos_ids(table, keys.where)}


def _feed_forwards(
    keys: Keys, name: str, experts: int, *, renormalise: bool = False
) -> tuple[MlpSpec, MoeSpec | None]:
    """The dense feed-forward and the mixture; one expert is no mixture in Jamba."""
    act = keys.get("hidden_act", str, "silu")
    if act not in ACTIVATIONS:
        raise unknown("activation", act, ACTIVATIONS)
    width = keys.count("intermediate_size", 14336)
    count, top = keys.count(name, experts), keys.count("num_experts_per_tok", 2)
    dense = MlpSpec(width, ACTIVATIONS[act])
    if count == 1 and not renormalise:
        return dense, None
    return dense, MoeSpec(width, count, top, ACTIVATIONS[act], renormalise)


def _attention(keys: Keys, kv_heads: int, *, rope=None, window=None) -> AttentionSpec:
    heads, width = (
        keys.count("num_attention_heads", 32),
        keys.count("hidden_size", 4096),
    )
    size = keys.get("head_dim", int)
    if size is None and width % heads:
        raise LclmError(
            f"{keys.where}: hidden_size {width} over {heads} heads leaves a rest"
        )
    kv_heads = keys.count("num_key_value_heads", kv_heads)
    return AttentionSpec(heads, kv_heads, size or width // heads, rope, window)


def _mamba(keys: Keys, norm: NormSpec) -> MambaSpec:
    width = keys.count("hidden_size", 4096)
    return MambaSpec(
        inner=keys.count("mamba_expand", 2) * width,
        rank=step_rank(keys, "mamba_dt_rank", width),
        state=keys.count("mamba_d_state", 16),
        conv=keys.count("mamba_d_conv", 4),
        conv_bias=keys.get("mamba_conv_bias", bool, True),
        proj_bias=keys.get("mamba_proj_bias", bool, False),
        inner_norms=True,
        norm_eps=norm.eps,
    )


def jamba_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a Jamba model, in the spelling of transformers 5.

    What no layer uses gets the smallest value that transformers accepts.
    """
    mixers = [layer.mixer for layer in config.layers]
    mlps = [layer.mlp for layer in config.layers]
    attention = _first(mixers, AttentionSpec) or AttentionSpec(1, 1, config.width)
    mamba = _first(mixers, MambaSpec) or MambaSpec(config.width, 1)
    experts = _first(mlps, MoeSpec)
    mlp = experts or _first(mlps, MlpSpec)
    if mlp is None or mamba.inner % config.width:
        raise LclmError(
            "a Hugging Face jamba config has gated feed-forwards in every layer and "
            f"Mamba channels in whole multiples of the width {config.width}; this "
            "model does not. Save it with format='orbax'"
        )
    attends = [isinstance(mixer, AttentionSpec) for mixer in mixers]
    period, offset = _rule(attends, ATTENTION_EVERY)
    mixes, start = _rule([isinstance(m, MoeSpec) for m in mlps], EXPERTS_EVERY)
    return {
        **_common(config, attention, mlp, dtype),
        "architectures": ["JambaForCausalLM"],
        "attn_layer_period": period,
        "attn_layer_offset": offset,
        "expert_layer_period": mixes,
        "expert_layer_offset": start,
        "num_experts": experts.experts if experts else 1,
        "num_experts_per_tok": experts.top if experts else 1,
        "mamba_expand": mamba.inner // config.width,
        "mamba_dt_rank": mamba.rank,
        "mamba_d_state": mamba.state,
        "mamba_d_conv": mamba.conv,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.proj_bias,
    }


def mixtral_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a Mixtral model, in the spelling of transformers 5."""
    layer = config.layers[0]
    attention, experts = layer.mixer, layer.mlp
    if not isinstance(attention, AttentionSpec) or not isinstance(experts, MoeSpec):
        raise LclmError(
            "a Hugging Face mixtral config has attention and experts in every layer; "
            f"the first layer is {layer}. Save it with format='orbax'"
        )
    return {
        **_common(config, attention, experts, dtype),
        "architectures": ["MixtralForCausalLM"],
        "head_dim": attention.head_dim,
        "num_local_experts": experts.experts,
        "num_experts_per_tok": experts.top,
        "sliding_window": attention.window,
        "rope_parameters": rope_to_hf(attention.rope),
    }


def _common(
    config: ModelConfig, attention: AttentionSpec, mlp: MlpSpec | MoeSpec, dtype: str
) -> dict[str, Any]:
    return {
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": mlp.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm.eps,
        "hidden_act": _HF_ACTIVATION[mlp.activation],
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos,
        "eos_token_id": eos_key(config.eos),
        "dtype": dtype,
    }


def _first(specs: list[Any], kind: type) -> Any:
    return next((spec for spec in specs if isinstance(spec, kind)), None)


def _rule(places: list[bool], usual: tuple[int, int]) -> tuple[int, int]:
    """A (period, offset) that names these layers, if there is one."""
    depth = len(places)
    if every(depth, *usual, what="") == tuple(places):
        return usual
    found = [i for i, here in enumerate(places) if here]
    if not found:
        return depth + 1, depth
    period = found[1] - found[0] if len(found) > 1 else depth
    return period, found[0] % period


def jamba_names(config: ModelConfig) -> Names:
    """Our path -> tensor name, or the names that a stack of experts is made of."""
    return _names(config, JAMBA_TOP, JAMBA_LAYER)


def mixtral_names(config: ModelConfig) -> Names:
    """Our path -> tensor name, or the names that a stack of experts is made of."""
    return _names(config, MIXTRAL_TOP, MIXTRAL_LAYER)


def _names(config: ModelConfig, top: dict[str, str], layer: dict[str, str]) -> Names:
    shapes = param_shapes(config)
    names = layer_names(shapes, top, layer, "model.layers.{}.")
    return {
        path: tuple(name.format(e) for e in range(shapes[path][0]))
        if "{}" in name
        else name
        for path, name in names.items()
    }


JAMBA = HfFamily(jamba_from_hf, jamba_to_hf, jamba_names)
MIXTRAL = HfFamily(mixtral_from_hf, mixtral_to_hf, mixtral_names)
