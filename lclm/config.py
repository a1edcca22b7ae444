"""Frozen descriptions of a model, and the strict dictionary form they are stored in.

Everything here is data: hashable, framework-free, comparable. A preset is a value of
`ModelConfig`; a checkpoint stores `to_dict(config)`.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any

from lclm.errors import LclmError, did_you_mean, unknown
from lclm.specs import (
    ANGLES,
    LAYOUTS,
    ROPE_KINDS,
    AttentionSpec,
    FeedForward,
    LayerNormSpec,
    Mixer,
    MlpSpec,
    NormSpec,
    RopeSpec,
    TimestepNormSpec,
    _require,
)

__all__ = [
    "ANGLES",
    "LAYOUTS",
    "ROPE_KINDS",
    "AttentionSpec",
    "LayerNormSpec",
    "LayerSpec",
    "MlpSpec",
    "ModelConfig",
    "NormSpec",
    "RopeSpec",
    "Run",
    "find_runs",
    "from_dict",
    "to_dict",
]

WIRINGS = ("prenorm", "twohop")
RMS = NormSpec()


@dataclass(frozen=True)
class LayerSpec:
    """One residual layer.

    "prenorm": x += mixer(norm(x)); x += mlp(norm(x)), the second half absent where
    `mlp` is None; `post_norms` adds Gemma's norms after each half. "twohop":
    y = x + mixer(x); x += mlp(norm(y)) (Megalodon; its mixer normalises for itself).
    """

    mixer: Mixer
    mlp: FeedForward | None
    norm: NormSpec | LayerNormSpec = RMS
    post_norms: bool = False
    wiring: str = "prenorm"

    def __post_init__(self):
        _require(
            self.wiring in WIRINGS, f"wiring {self.wiring!r}: use one of {WIRINGS}"
        )


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
    """A decoder as data. `context` is the trained length in tokens.

    `residual_float32` keeps the residual stream in float32 whatever the activations
    are (Mamba).
    """

    family: str
    vocab: int
    width: int
    stack: tuple[Run, ...]
    context: int
    norm: NormSpec | LayerNormSpec | TimestepNormSpec = RMS
    tied: bool = True
    embed_scale: float | None = None
    final_softcap: float | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()
    residual_float32: bool = False

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
    """Plain JSON-able form of a frozen dataclass tree.

    Specs that are one of several kinds carry their `TYPE` under "type".
    """
    if dataclasses.is_dataclass(value):
        data = {f.name: to_dict(getattr(value, f.name)) for f in _fields(value)}
        kind = getattr(value, "TYPE", None)
        return data if kind is None else {"type": kind} | data
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    return value


def from_dict(cls: type, data: Any, where: str = "") -> Any:
    """Rebuild `cls` from `to_dict`'s form; unknown or mistyped keys are errors."""
    if not isinstance(data, dict):
        raise LclmError(f"{where or cls.__name__}: expected a table, found {data!r}")
    if hasattr(cls, "TYPE"):
        data = {k: v for k, v in data.items() if k != "type"}
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
        kind = scalars[0] if scalars else _tagged(tables, value, where)
        return _convert(kind, value, where)
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


def _tagged(kinds: list[type], value: Any, where: str) -> type:
    """The dataclass that a stored table names; the first where it names none."""
    if len(kinds) == 1:
        return kinds[0]
    if isinstance(value, tuple(kinds)):
        return type(value)
    known = {kind.TYPE: kind for kind in kinds}
    name = value.get("type", kinds[0].TYPE) if isinstance(value, dict) else None
    if isinstance(value, dict) and name not in known:
        raise unknown(f"type of {where}:", name, known)
    return known.get(name, kinds[0])
