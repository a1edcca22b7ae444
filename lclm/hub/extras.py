"""Small files of what was trained beside a frozen model: gates, retaining heads.

A safetensors file whose metadata is {"format": "lclm-extra-1", "kind": the objective's
name, "base": the model it was trained for, "settings": a JSON table}. Its tensors are
the objective's parameters by path, float32:

duo_gates: alpha [L, K]; settings sinks, window, penalty, start.
locret_heads: w1 [L, F, (N + 2 K) H] over concat(q, k, v) before rotation, w2 [L, K, F];
settings hidden, smooth.

L counts attention layers from the input on, K kv heads.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lclm.errors import LclmError

FORMAT, NAME = "lclm-extra-1", "extra.safetensors"


@dataclass(frozen=True)
class Extra:
    """The contents of such a file."""

    kind: str
    base: str
    params: dict[str, np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)


def save_extra(folder: str | Path, extra: Extra) -> Path:
    """Write `folder`/extra.safetensors and return its path."""
    path = Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: np.ascontiguousarray(np.asarray(leaf, np.float32))
        for name, leaf in extra.params.items()
    }
    metadata = {
        "format": FORMAT,
        "kind": extra.kind,
        "base": extra.base,
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
    return Extra(head["kind"], head["base"], params, json.loads(head["settings"]))
