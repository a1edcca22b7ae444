"""Small files of what was trained beside a frozen model: gates, retaining heads.

A safetensors file whose metadata is {"format": "lclm-extra-1", "kind": the objective's
name, "base": the model it was trained for, "model": what `shape` says of that model,
"settings": a JSON table}. Its tensors are the objective's parameters by path:

duo_gates: alpha [L, K] float32; settings sinks, window, penalty, start.
locret_heads: w1 [L, F, (N + 2 K) H] over concat(q, k, v) before rotation, w2 [L, K, F],
float16; settings hidden, smooth.

L counts attention layers from the input on, K kv heads.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lclm.config import AttentionSpec, ModelConfig
from lclm.errors import LclmError

FOLDER = Path(__file__).parent
FORMAT, NAME = "lclm-extra-1", "extra.safetensors"
TYPES = {"locret_heads": np.float16}  # scores move by less than 1e-3 of themselves


@dataclass(frozen=True)
class Extra:
    """The contents of such a file."""

    kind: str
    base: str
    params: dict[str, np.ndarray]
    model: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)


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
    return Extra(head["kind"], head["base"], params, model, settings)


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


def find(kind: str, config: ModelConfig, file: str = "", *, hint: str) -> Extra:
    """The trained part of a kind for a model: of `file`, or one that ships with lclm.

    Raises LclmError, which ends in `hint`, where there is none or it is of another
    model.
    """
    wanted = shape(config)
    if file:
        extra = load_extra(file, kind=kind)
        if extra.model != wanted:
            raise LclmError(
                f"{file!r} holds {kind} of {extra.base!r} ({_told(extra.model)}), but "
                f"this model has {_told(wanted)}; {hint}"
            )
        return extra
    known = []
    for path in sorted(FOLDER.glob("*.safetensors")):
        extra = load_extra(path)
        if extra.kind == kind and extra.model == wanted:
            return extra
        known += [extra.base] if extra.kind == kind else []
    raise LclmError(
        f"lclm ships {kind} for {', '.join(known) or 'no model'}, but this model has "
        f"{_told(wanted)}; {hint}"
    )


def _told(model: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in model.items())
