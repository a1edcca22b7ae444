"""Small files of what was trained beside a frozen model: gates, retaining heads.

A safetensors file whose metadata is {"format": "lclm-extra-1", "kind": the objective's
name, "base": the model it was trained for, "model": what `shape` says of that model,
"weights": its `fingerprint`, "settings": a JSON table}. Its tensors are the objective's
parameters by path:

duo_gates: alpha [L, K] float32; settings sinks, window, penalty, start.
locret_heads: w1 [L, F, (N + 2 K) H] over concat(q, k, v) before rotation, w2 [L, K, F],
float16; settings hidden, smooth.

L counts attention layers from the input on, K kv heads.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lclm.config import AttentionSpec, ModelConfig
from lclm.errors import LclmError

FOLDER = Path(__file__).parent
FORMAT, NAME = "lclm-extra-1", "extra.safetensors"
SAMPLE = 8  # rows and channels of a fingerprint
TYPES = {"locret_heads": np.float16}  # scores move by less than 1e-3 of themselves


@dataclass(frozen=True)
class Extra:
    """The contents of such a file."""

    kind: str
    base: str
    params: dict[str, np.ndarray]
    model: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()


def save_extra(folder: str | Path, extra: Extra) -> Path:
    """Write `folder`/extra.safetensors and return its path."""
    path = Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = TYPES.get(extra.kind, np.float32)
    tensors = {
        name: np.ascontiguousarray(np.asarray(leaf, dtype))
        for name, leaf in extra.params.items()
    }
    metadata = {
        "format": FORMAT,
        "kind": extra.kind,
        "base": extra.base,
        "model": json.dumps(extra.model),
        "weights": json.dumps(extra.weights),
        "settings": json.dumps(extra.settings),
    }
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata=metadata)
    part.rename(path)
    return path


def load_extra(path: str | Path, *, kind: str | None = None) -> Extra:
    """Read such a file, or the one in a folder; `kind` refuses any other.

    Raises LclmError for a file that is missing, damaged, or something else.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise LclmError(f"{path}: no such file; train one (docs/training.md)")
    try:
        with safe_open(path, framework="numpy") as file:
            head = file.metadata() or {}
            params = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise LclmError(f"{path} is not a usable safetensors file: {error}") from error
    if head.get("format") != FORMAT:
        raise LclmError(
            f"{path}: format is {head.get('format')!r}; this version reads {FORMAT!r}"
        )
    if kind is not None and head["kind"] != kind:
        raise LclmError(f"{path} holds {head['kind']!r}, not {kind!r}")
    if "model" not in head:
        raise LclmError(
            f"{path} does not say which model it is for; train it with this version"
        )
    model, settings = json.loads(head["model"]), json.loads(head["settings"])
    weights = tuple(json.loads(head.get("weights", "[]")))
    return Extra(head["kind"], head["base"], params, model, settings, weights)


def shape(config: ModelConfig) -> dict[str, int]:
    """What tells models apart to a trained part: counts of one attention layer each."""
    found = [s.mixer for s in config.layers if isinstance(s.mixer, AttentionSpec)]
    if not found:
        raise LclmError("the model has no attention layer, so there is nothing to fit")
    first = found[0]
    return {
        "layers": len(found),
        "heads": first.heads,
        "kv_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "width": config.width,
        "vocab": config.vocab,
    }


def fingerprint(table: Any) -> tuple[float, ...]:
    """A few numbers of an embedding [V, D], dense or packed: 8 channels of 8 rows.

    They are those of the weights, whatever type or rounding these were loaded in.
    """
    table = table if hasattr(table, "take") else table.base  # under a LoRA adapter
    rows = np.linspace(0, table.shape[0] - 1, SAMPLE).astype(int)
    some = (
        table.take(jnp.asarray(rows)) if hasattr(table, "dequantize") else table[rows]
    )
    channels = np.linspace(0, table.shape[1] - 1, SAMPLE).astype(int)
    picked = np.asarray(some, np.float32)[:, channels].reshape(-1)
    return tuple(float(f"{x:.3g}") for x in picked)


def alike(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two fingerprints are of the same weights, or of some trained further.

    Their cosine is above 0.99 for weights rounded to 4 bits, and within 0.5 of zero
    for weights drawn apart.
    """
    if len(one) != len(other) or not one:
        return False
    a, b = np.array(one), np.array(other)
    return bool(a @ b >= 0.9 * np.linalg.norm(a) * np.linalg.norm(b))


@dataclass(frozen=True)
class Model:
    """Who asks for a trained part: its name, "" if it has none, and its embedding."""

    name: str
    table: Any

    @property
    def weights(self) -> tuple[float, ...]:
        """Its fingerprint."""
        return fingerprint(self.table)


def find(
    kind: str,
    config: ModelConfig,
    file: str = "",
    *,
    hint: str,
    model: Model | None = None,
) -> Extra:
    """The trained part of a kind for a model: of `file`, or one that ships with lclm.

    It has to have been made for a model of this shape and, where it is told who asks,
    for these weights; a file that names the very model that asks is believed. Raises
    LclmError, which ends in `hint`, where there is none.
    """
    wanted, other = shape(config), ""
    if file:
        extra = load_extra(file, kind=kind)
        if extra.model != wanted:
            raise LclmError(
                f"{file!r} holds {kind} of {extra.base!r} ({_told(extra.model)}), but "
                f"this model has {_told(wanted)}; {hint}"
            )
        if (
            model
            and extra.base != model.name
            and not alike(extra.weights, model.weights)
        ):
            raise LclmError(
                f"{file!r} holds {kind} of {extra.base!r}, but {_who(model)} has other "
                f"weights in the same shape; {hint}"
            )
        return extra
    known = []
    for path in sorted(FOLDER.glob("*.safetensors")):
        extra = load_extra(path)
        if extra.kind != kind:
            continue
        known.append(extra.base)
        if extra.model == wanted:
            if model is None or alike(extra.weights, model.weights):
                return extra
            other = f"the shape of {extra.base!r} and other weights"
    raise LclmError(
        f"lclm ships {kind} for {', '.join(known) or 'no model'}, but "
        f"{_who(model)} has {other or _told(wanted)}; {hint}"
    )


def _who(model: Model | None) -> str:
    return f"the model {model.name!r}" if model and model.name else "this model"


def _told(model: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in model.items())
