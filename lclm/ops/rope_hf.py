"""Hugging Face spellings of rotary parameters, read into and written from RopeSpec.

Four spellings exist: v5 `rope_parameters`, flat or nested per layer type; v4
`rope_theta` with `rope_scaling` keyed by `rope_type`; and the same keyed by `type`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lclm.config import ROPE_KINDS, RopeSpec
from lclm.errors import LclmError, did_you_mean, unknown

FIELDS = {  # Hugging Face's name -> ours
    "rope_theta": "theta",
    "partial_rotary_factor": "partial",
    "original_max_position_embeddings": "original",
    **{
        name: name
        for name in (
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "low_freq_factor",
            "high_freq_factor",
            "short_factor",
            "long_factor",
        )
    },
}
COMMON = ("rope_theta", "partial_rotary_factor")
ORIGINAL = "original_max_position_embeddings"
YARN = (
    "factor",
    ORIGINAL,
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
KEYS = {  # kind -> keys it may carry besides COMMON and the type itself
    "default": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor",),
    "dynamic_linear": (ORIGINAL,),
    "yarn": (*YARN, "truncate"),
    "yarn_paper": YARN,
    "longrope": ("factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "proportional": ("factor",),
}
REQUIRED = {
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
GEMMA3_THETA = {"full_attention": 1e6, "sliding_attention": 1e4}


def rope_from_hf(config: Mapping[str, Any]) -> RopeSpec | dict[str, RopeSpec | None]:
    """The rotary embedding of a Hugging Face `config.json`, in any of its spellings.

    Gives one RopeSpec, or one per layer type where the config nests them or is a
    Gemma 3 (`rope_local_base_freq`); None marks a layer type without positions. Raises
    LclmError for unknown types or keys, missing or mistyped numbers, factors <= 0, and
    for `rope_parameters` and `rope_scaling` that disagree.
    """
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, Mapping):
            raise LclmError(f"{name} is {value!r}; expected a table or null")
    if new and old and new != old:
        raise LclmError(
            "the config has both rope_parameters and rope_scaling, and they differ: "
            "keep one of them"
        )
    table = dict(old or new or {})
    if config.get("model_type") in ("gemma3", "gemma3_text"):
        return _gemma3(config, table)
    if config.get("rope_local_base_freq") is not None:
        return _gemma3(config, table)
    if any(isinstance(value, Mapping) for value in table.values()):
        return _nested(config, table)
    if config.get(ORIGINAL) is not None and ORIGINAL in KEYS[_kind(table)]:
        table[ORIGINAL] = config[ORIGINAL]  # Phi-3: the outer field wins
    return _spec(config, table, truncate=table.get("truncate"))


def rope_to_hf(spec: RopeSpec | Mapping[str, RopeSpec | None]) -> dict[str, Any]:
    """The v5 `rope_parameters` table of a spec, or the nested one of a spec per type.

    `context` goes to `max_position_embeddings`, which the caller writes. The table has
    no place for `angles`, an attention factor outside YaRN and longrope, or the
    interleaved layout: the last two raise LclmError.
    """
    if isinstance(spec, RopeSpec):
        return _flat(spec)
    tables = {name: None if s is None else _flat(s) for name, s in spec.items()}
    yarns = [s for s in spec.values() if s is not None and s.kind == "yarn"]
    if len({s.truncate for s in yarns}) > 1:
        raise LclmError(
            "YaRN layer types differ in `truncate`, which Hugging Face keeps once for "
            "all: use one value"
        )
    for table in tables.values():
        if table is not None:
            table.pop("truncate", None)
    if yarns and not yarns[0].truncate:
        return {**tables, "truncate": False}
    return tables


def _flat(spec: RopeSpec) -> dict[str, Any]:
    if spec.layout != "half":
        raise LclmError(
            f"RoPE layout {spec.layout!r} cannot be written for Hugging Face: permute "
            "the q and k rows (even channels first, then odd) and use layout='half'"
        )
    keys = KEYS[spec.kind]
    if spec.attention_factor is not None and "attention_factor" not in keys:
        raise LclmError(
            f"attention_factor {spec.attention_factor} with RoPE type {spec.kind!r} "
            "has no Hugging Face form: only yarn and longrope carry one"
        )
    plain = RopeSpec()
    table: dict[str, Any] = {"rope_type": spec.kind, "rope_theta": spec.theta}
    for key in (*COMMON[1:], *keys):
        value = getattr(spec, FIELDS[key])
        if value != getattr(plain, FIELDS[key]):
            table[key] = list(value) if isinstance(value, tuple) else value
    return table


def _gemma3(config: Mapping[str, Any], table: dict) -> dict[str, RopeSpec | None]:
    """Gemma 3: a scaled global base and a plain local one, each with its default."""
    if not any(isinstance(value, Mapping) for value in table.values()):
        table = {"full_attention": table} if table else {}
    outer = {
        "full_attention": config.get("rope_theta"),
        "sliding_attention": config.get("rope_local_base_freq"),
    }
    for name, theta in outer.items():
        own = dict(table.get(name) or {})
        own.setdefault("rope_theta", GEMMA3_THETA[name] if theta is None else theta)
        table[name] = own
    return _nested(config, table)


def _nested(config: Mapping[str, Any], table: dict) -> dict[str, RopeSpec | None]:
    specs: dict[str, RopeSpec | None] = {}
    truncate = table.pop("truncate", None)
    for name, own in table.items():
        if own is not None and not isinstance(own, Mapping):
            raise LclmError(
                f"rope_parameters is nested per layer type but {name!r} is {own!r}: "
                "move it into each layer type's table"
            )
        # Hugging Face reads `truncate` beside the layer types, never inside them
        specs[name] = None if own is None else _spec(config, own, truncate=truncate)
    return specs


def _kind(table: Mapping[str, Any]) -> str:
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind == "su" or (kind == "yarn" and "short_factor" in table):
        return "longrope"  # both are older names of it in Phi-3
    if kind not in ROPE_KINDS:
        raise unknown("RoPE type", kind, ROPE_KINDS)
    return kind


def _spec(config: Mapping[str, Any], table: Mapping[str, Any], *, truncate) -> RopeSpec:
    kind = _kind(table)
    allowed = (*COMMON, *KEYS[kind])
    fields: dict[str, Any] = {}
    for key, value in table.items():
        if key in ("rope_type", "type"):
            continue
        if key not in allowed:
            raise LclmError(
                f"RoPE type {kind!r} has no key {key!r}: known are "
                f"{', '.join(allowed)}{did_you_mean(key, allowed)}"
            )
        if value is not None and key != "truncate":
            fields[FIELDS[key]] = _number(key, value)
    for key in REQUIRED.get(kind, ()):
        if FIELDS[key] not in fields:
            raise LclmError(f"RoPE type {kind!r} needs {key!r}, which is missing")
    for key in COMMON:
        if config.get(key) is not None:
            fields.setdefault(FIELDS[key], _number(key, config[key]))
    context = config.get("max_position_embeddings")
    if context is not None:
        fields["context"] = _count("max_position_embeddings", context)
    elif kind == "dynamic" or (ORIGINAL in KEYS[kind] and "original" not in fields):
        raise LclmError(
            f"RoPE type {kind!r} needs max_position_embeddings, which is missing"
        )
    if kind == "yarn" and truncate is not None:
        if not isinstance(truncate, bool):
            raise LclmError(f"truncate is {truncate!r}; expected true or false")
        fields["truncate"] = truncate
    return dataclasses.replace(RopeSpec(), kind=kind, **fields)


def _number(key: str, value: Any) -> float | int | tuple[float, ...]:
    if key == ORIGINAL:
        return _count(key, value)
    if key in ("short_factor", "long_factor"):
        if not isinstance(value, list | tuple) or not value:
            raise LclmError(f"{key} is {value!r}; expected a list of numbers")
        return tuple(_real(f"{key}[{i}]", v) for i, v in enumerate(value))
    return _real(key, value)


def _real(key: str, value: Any) -> float:
    bad = isinstance(value, bool) or not isinstance(value, int | float)
    if bad or not math.isfinite(value):
        raise LclmError(f"{key} is {value!r}; expected a finite number")
    return float(value)


def _count(key: str, value: Any) -> int:
    number = _real(key, value)
    if number < 1 or number != int(number):
        raise LclmError(f"{key} is {value!r}; expected a whole number >= 1")
    return int(number)
