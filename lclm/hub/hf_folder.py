"""Hugging Face folders in and out: config.json, safetensors, tokenizer files."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lclm.errors import LclmError
from lclm.hub.bundle import Bundle, check_shapes, flatten, nest
from lclm.hub.hf_config import config_from_hf, config_to_hf
from lclm.hub.json_file import read_json
from lclm.hub.names import hf_names, param_shapes
from lclm.hub.safetensors_io import INDEX, SHARD_BYTES, TensorFolder, write_tensors
from lclm.hub.tokenizer_files import read_tokenizer, write_tokenizer
from lclm.ops.int8 import Int8Weight
from lclm.ops.packed import PackedWeight

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
    shapes = {n: s for n, s in tensors.shapes.items() if not _surplus(n, config.tied)}
    check_shapes(
        shapes, {names[p]: s for p, s in param_shapes(config).items()}, str(folder)
    )
    tensors.check_dtypes(list(names.values()))
    flat = {}
    for path, name in names.items():
        stored = tensors.read(name)
        flat[path] = jnp.asarray(stored if dtype is None else stored.astype(dtype))
    tokenizer = read_tokenizer(folder, bos=config.bos, eos=config.eos)
    return Bundle(config, nest(flat), tokenizer, str(folder), folder)


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
    tensors = {names[path]: flat[path] for path in names}

    def write(work: Path) -> None:
        write_tensors(work, tensors, shard_bytes=shard_bytes)
        (work / CONFIG).write_text(json.dumps(table, indent=2) + "\n")
        if bundle.tokenizer is not None:
            write_tokenizer(work, bundle.tokenizer)

    fill(Path(folder), write, stale=("model*.safetensors", INDEX))


def dense(bundle: Bundle) -> dict[str, Any]:
    """The parameters by path, complete and unpacked, or an `LclmError`."""
    flat = flatten(bundle.params)
    packed = [p for p, w in flat.items() if isinstance(w, PackedWeight | Int8Weight)]
    if packed:
        raise LclmError(
            f"{len(packed)} weights are packed ({packed[0]}, ...): load the model with "
            "packed=None and quantize=None to save it"
        )
    shapes = {p: tuple(w.shape) for p, w in flat.items()}
    check_shapes(shapes, param_shapes(bundle.config), bundle.source or "parameters")
    return flat


def fill(
    folder: Path, write: Callable[[Path], None], *, stale: tuple[str, ...] = ()
) -> None:
    """Run `write` on a folder beside, then move its files in: whole or not at all.

    Files of an earlier save that match `stale` and were not written again go.
    """
    if folder.exists() and not folder.is_dir():
        raise LclmError(f"{folder} is a file; give the name of a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as work:
        write(Path(work))
        folder.mkdir(exist_ok=True)
        written = sorted(Path(work).iterdir())
        for pattern in stale:
            for old in folder.glob(pattern):
                if old.name not in {w.name for w in written}:
                    old.unlink()
        for path in written:
            os.replace(path, folder / path.name)
