"""Frozen descriptions of a model, and the strict dictionary form they are stored in.

Everything here is data: hashable, framework-free, comparable. A preset is a value of
`ModelConfig`; a checkpoint stores `to_dict(config)`.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from lclm.errors import LclmError, did_you_mean

ROPE_KINDS = (
    "default",
    "linear",
    "ntk",
    "dynamic",
    "dynamic_linear",
    "yarn",
    "yarn_paper",
    "longrope",
    "llama3",
    "proportional",
)
LAYOUTS = ("half", "interleaved")
ANGLES = ("hf", "exact")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def _require(ok: bool, text: str) -> None:
    if not ok:
        raise LclmError(text)


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding; field names follow Hugging Face `rope_parameters`.

    `context` is `max_position_embeddings`; `original` is the length the frequencies
    were trained for (`original_max_position_embeddings`), `context` where None.
    """

    kind: str = "default"
    theta: float = 10000.0
    context: int = 8192
    factor: float | None = None
    original: int | None = None
    partial: float = 1.0
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    layout: str = "half"
    angles: str = "hf"

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            hint = did_you_mean(self.kind, ROPE_KINDS)
            raise LclmError(
                f"unknown RoPE type {self.kind!r}: known are {', '.join(ROPE_KINDS)}"
                f"{hint}"
            )
        _require(self.layout in LAYOUTS, f"RoPE layout {self.layout!r}: use {LAYOUTS}")
        _require(self.angles in ANGLES, f"RoPE angles {self.angles!r}: use {ANGLES}")
        _require(self.theta > 0, f"rope_theta is {self.theta}; it must be > 0")
        _require(
            self.factor is None or self.factor > 0,
            f"RoPE factor is {self.factor}; it must be > 0 (1 means no scaling)",
        )
        _require(0 < self.partial <= 1, f"partial_rotary_factor {self.partial}: 0..1")
        _require(self.context >= 1, f"RoPE context is {self.context}; it must be >= 1")

    @property
    def dynamic(self) -> bool:
        """Whether frequencies depend on the current length (keys cached unrotated)."""
        return self.kind in ("dynamic", "dynamic_linear", "longrope")


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query softmax attention. `rope=None` means no position at all.

    `window`: a query sees this many tokens, itself included; None sees all.
    `scale`: multiplies q.k; None is head_dim ** -0.5. `sink`: learned logit per head.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeSpec | None = field(default_factory=RopeSpec)
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sink: bool = False

    def __post_init__(self):
        _require(
            self.kv_heads >= 1 and self.heads % self.kv_heads == 0,
            f"{self.heads} heads over {self.kv_heads} kv heads: heads must be a "
            "multiple of kv_heads",
        )
        _require(
            self.window is None or self.window >= 1,
            f"attention window is {self.window}; it must be at least 1 token",
        )


@dataclass(frozen=True)
class MlpSpec:
    """Gated feed-forward: down(act(gate(x)) * up(x)), `width` hidden units."""

    width: int
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            hint = did_you_mean(self.activation, ACTIVATIONS)
            raise LclmError(
                f"unknown activation {self.activation!r}: known are "
                f"{', '.join(ACTIVATIONS)}{hint}"
            )


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm: x / rms(x) * (scale + offset); Gemma stores scale with offset 1."""

    eps: float = 1e-5
    offset: float = 0.0


@dataclass(frozen=True)
class LayerSpec:
    """One pre-norm residual layer; `post_norms` adds Gemma's norms after each half."""

    mixer: AttentionSpec
    mlp: MlpSpec
    norm: NormSpec = NormSpec()
    post_norms: bool = False


@dataclass(frozen=True)
class Run:
    """A group of unlike layers repeated `repeats` times: one scan in training."""

    group: tuple[LayerSpec, ...]
    repeats: int = 1

    def __post_init__(self):
        _require(self.repeats >= 1, f"a run of {self.repeats} repeats: at least 1")
        _require(len(self.group) >= 1, "a run needs at least one layer in its group")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder as data. `context` is the trained length in tokens."""

    family: str
    vocab: int
    width: int
    stack: tuple[Run, ...]
    context: int
    norm: NormSpec = NormSpec()
    tied: bool = True
    embed_scale: float | None = None
    final_softcap: float | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer in order."""
        return tuple(s for r in self.stack for _ in range(r.repeats) for s in r.group)


def find_runs(layers: tuple[LayerSpec, ...], longest: int = 8) -> tuple[Run, ...]:
    """Greedy cover of a layer list by repeated groups of at most `longest` layers."""
    runs: list[Run] = []
    at = 0
    while at < len(layers):
        best = Run(layers[at : at + 1], 1)
        for size in range(1, min(longest, len(layers) - at) + 1):
            group = layers[at : at + size]
            count = 1
            while layers[at + count * size : at + (count + 1) * size] == group:
                count += 1
            covered = size * count
            if count > 1 and covered > len(best.group) * best.repeats:
                best = Run(group, count)
        runs.append(best)
        at += len(best.group) * best.repeats
    return tuple(runs)


def to_dict(value: Any) -> Any:
    """Plain JSON-able form of a frozen dataclass tree."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in _fields(value)}
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    return value


def from_dict(cls: type, data: Any, where: str = "") -> Any:
    """Rebuild `cls` from `to_dict`'s form; unknown or mistyped keys are errors."""
    if not isinstance(data, dict):
        raise LclmError(f"{where or cls.__name__}: expected a table, found {data!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in _fields(cls)]
    for key in data:
        if key not in names:
            raise LclmError(
                f"{where or cls.__name__} has no option {key!r}: known are "
                f"{', '.join(names)}{did_you_mean(key, names)}"
            )
    kwargs = {k: _convert(hints[k], v, f"{where}{k}") for k, v in data.items()}
    required = [
        f.name
        for f in _fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in kwargs:
            raise LclmError(
                f"{where or cls.__name__}: required option {name!r} missing"
            )
    return cls(**kwargs)


def _fields(value: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(value)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        tables = [a for a in args if dataclasses.is_dataclass(a)]
        scalars = [a for a in args if a is not type(None) and a not in tables]
        return _convert((tables or scalars)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where + ".")
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise LclmError(f"{where} is {value!r}; expected a list")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise LclmError(f"{where} is {value!r}; expected {hint.__name__}")
    return value
