"""Hugging Face folders in and out: config.json, safetensors, tokenizer files."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lclm import processes
from lclm.errors import LclmError
from lclm.hub.bundle import Bundle, check_shapes
from lclm.hub.families import HF, Names
from lclm.hub.hf_config import config_from_hf, config_to_hf
from lclm.hub.json_file import read_json
from lclm.hub.names import hf_names, param_shapes
from lclm.hub.safetensors_io import INDEX, SHARD_BYTES, TensorFolder, write_tensors
from lclm.hub.tokenizer_files import read_tokenizer, write_tokenizer
from lclm.ops.int8 import Int8Weight
from lclm.ops.lora import LoraWeight
from lclm.ops.packed import PackedWeight
from lclm.tree import flatten, nest

CONFIG = "config.json"


def load_hf(folder: Path, *, dtype: Any = None) -> Bundle:
    """Read a Hugging Face folder; `dtype` None keeps the stored types.

    Names, shapes and types of all tensors are checked before the first is read.
    """
    where = str(folder / CONFIG)
    table = read_json(folder / CONFIG)
    config = config_from_hf(table, where)
    names = hf_names(config, config.family)
    tensors = TensorFolder(folder)
    stored = _spelling(tensors, config.family)
    shapes = {
        n: tensors.shapes[s] for n, s in stored.items() if not _surplus(n, config.tied)
    }
    check_shapes(shapes, _file_shapes(names, param_shapes(config)), str(folder))
    tensors.check_dtypes([stored[n] for v in names.values() for n in _each(v)])

    def read(name: str | tuple[str, ...]) -> np.ndarray:
        parts = [tensors.read(stored[n]) for n in _each(name)]
        values = parts[0] if isinstance(name, str) else np.stack(parts)
        return values if dtype is None else values.astype(dtype)

    flat = {path: jnp.asarray(read(name)) for path, name in names.items()}
    tokenizer = read_tokenizer(folder, bos=config.bos, eos=config.eos)
    return Bundle(config, nest(flat), tokenizer, str(folder), folder)


def _spelling(tensors: TensorFolder, family: str) -> dict[str, str]:
    """Tensor name as its family spells it -> as this folder does."""
    rename = HF[family].rename if family in HF.entries else str
    return {rename(name): name for name in tensors.shapes}


def _each(name: str | tuple[str, ...]) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else name


def _file_shapes(
    names: Names, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the file; parts of a stack lose its axis."""
    found = {}
    for path, name in names.items():
        shape = shapes[path] if isinstance(name, str) else shapes[path][1:]
        found |= dict.fromkeys(_each(name), shape)
    return found


def _surplus(name: str, tied: bool) -> bool:
    """Tensors that old files carry and no model reads."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def save_hf(
    folder: str | Path, bundle: Bundle, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config.json, safetensors and tokenizer files that transformers reads.

    Raises `LclmError` for packed weights, parameters that do not fit the description,
    or a model that the family's config.json cannot describe; then nothing is written.
    """
    flat = dense(bundle)
    dtype = flat["embed/table"].dtype.name
    table = config_to_hf(bundle.config, dtype)
    names = hf_names(bundle.config, bundle.config.family)
    tensors = {}
    for path, name in names.items():
        parts = (flat[path],) if isinstance(name, str) else flat[path]
        tensors |= dict(zip(_each(name), parts, strict=True))

    def write(work: Path) -> None:
        write_tensors(work, tensors, shard_bytes=shard_bytes)
        (work / CONFIG).write_text(json.dumps(table, indent=2) + "\n")
        if bundle.tokenizer is not None:
            write_tokenizer(work, bundle.tokenizer)

    fill(Path(folder), write, stale=("model*.safetensors", INDEX))


def dense(bundle: Bundle) -> dict[str, Any]:
    """The parameters by path, complete and unpacked, or an `LclmError`."""
    flat = flatten(bundle.params)
    loose = PackedWeight | Int8Weight | LoraWeight
    packed = [p for p, w in flat.items() if isinstance(w, loose)]
    if packed:
        raise LclmError(
            f"{len(packed)} weights are packed ({packed[0]}, ...): load the model with "
            "packed=None and quantize=None to save it"
        )
    shapes = {p: tuple(w.shape) for p, w in flat.items()}
    check_shapes(shapes, param_shapes(bundle.config), bundle.source or "parameters")
    return flat


def fill(
    folder: Path,
    write: Callable[[Path], None],
    *,
    stale: tuple[str, ...] = (),
    together: bool = False,
) -> None:
    """Run `write` on a folder beside, then move its files in: whole or not at all.

    Files of an earlier save that match `stale` and were not written again go. Of
    several processes each one must call this; the first alone writes, or all of them
    `together`, in one folder.
    """
    if folder.exists() and not folder.is_dir():
        raise LclmError(f"{folder} is a file; give the name of a folder")
    number = processes.told(random.SystemRandom().getrandbits(31))
    work = folder.parent / f".saving-{number:08x}"
    try:
        work.mkdir(parents=True, exist_ok=processes.count() > 1)
        if together or processes.first():
            write(work)
        if processes.first():
            _move(work, folder, stale)
    finally:
        processes.meet(f"{folder} is written")
        shutil.rmtree(work, ignore_errors=True)


def _move(work: Path, folder: Path, stale: tuple[str, ...]) -> None:
    folder.mkdir(exist_ok=True)
    written = sorted(work.iterdir())
    for pattern in stale:
        for old in folder.glob(pattern):
            if old.name not in {w.name for w in written}:
                old.unlink()
    for path in written:
        os.replace(path, folder / path.name)
