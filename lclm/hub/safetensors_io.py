"""Safetensors files and their shard index, tensor by tensor."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lclm.errors import LclmError
from lclm.hub.json_file import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class TensorFolder:
    """The tensors of a folder: names, shapes and types at once, values on demand.

    Raises `LclmError` for a missing, damaged or foreign file, and for a shard name
    that leaves the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        index = folder / INDEX
        listed = _weight_map(index) if index.is_file() else {}
        for name in sorted(set(listed.values())) or [SINGLE]:
            self._open(name)
        for tensor, name in listed.items():
            if self._where.get(tensor) != name:
                raise LclmError(
                    f"{index}: places tensor {tensor} in {name}, which does not hold it"
                )

    def _open(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            pickled = sorted(p.name for p in self.folder.glob("*.bin"))
            if pickled:
                raise LclmError(
                    f"{path}: no such file, and {pickled[0]} is a Python pickle, which "
                    "may run code and is not read: save the model as safetensors "
                    "(transformers: save_pretrained)"
                )
            raise LclmError(
                f"{path}: no such file; a Hugging Face folder needs {SINGLE}, or "
                f"{INDEX} with every shard it names"
            )
        try:
            file = safe_open(path, framework="numpy").__enter__()
            for tensor in file.keys():
                if tensor in self._where:
                    raise LclmError(
                        f"{path}: tensor {tensor} is also in {self._where[tensor]}"
                    )
                part = file.get_slice(tensor)
                self.shapes[tensor] = tuple(part.get_shape())
                self.dtypes[tensor] = part.get_dtype()
                self._file[tensor], self._where[tensor] = file, name
        except (SafetensorError, OSError) as error:
            raise LclmError(
                f"{path} is not a usable safetensors file: {error}. It may be "
                "truncated; fetch it again."
            ) from error

    def check_dtypes(self, names: list[str]) -> None:
        """Refuse integer and 8-bit tensors before any is read."""
        for name in names:
            if self.dtypes[name] not in DTYPES:
                raise LclmError(
                    f"{self.folder / self._where[name]}: tensor {name} has type "
                    f"{self.dtypes[name]}; readable are {', '.join(DTYPES)}"
                )

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored."""
        return self._file[name].get_tensor(name)


def _weight_map(index: Path) -> dict[str, str]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise LclmError(f"{index}: no weight_map with tensor and file names")
    for tensor, name in listed.items():
        plain = isinstance(name, str) and name.endswith(".safetensors")
        if not plain or Path(name).name != name or "\\" in name or "\0" in name:
            raise LclmError(
                f"{index}: tensor {tensor} is said to be in {name!r}; a shard is a "
                ".safetensors file in the same folder"
            )
    return listed


def write_tensors(
    folder: Path, tensors: dict[str, Any], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write one model.safetensors, or shards of at most `shard_bytes` and an index.

    A shard's arrays are brought to the host only while it is written.
    """
    shards = _shards(tensors, shard_bytes)
    total = sum(t.nbytes for t in tensors.values())
    weight_map = {}
    for i, names in enumerate(shards):
        name = SINGLE
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {n: np.ascontiguousarray(tensors[n]) for n in names}
        save_file(arrays, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: dict[str, Any], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
