"""A bounds-checked view of a GGUF file (format v2 and v3, little-endian).

Every count, length and offset is compared with the bytes that are there before
anything is sized by it, so a hostile header costs one error and no memory. Values and
block layouts come from the `gguf` package; strings are read once, in one pass.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from lclm.errors import LclmError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# GGUF value type -> struct code; 8 is a string, 9 an array
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_MIN_KEY, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's place; `shape` is [out, in] (the file says [in, out])."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    nbytes: int


class _Cursor:
    """Reads forward through a header; never past its end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def fail(self, what: str) -> LclmError:
        return LclmError(
            f"{self.path} is not a usable GGUF file: {what} (file size "
            f"{len(self.data)} bytes). It may be truncated or damaged; fetch it again."
        )

    def room(self, count: int, size: int, what: str) -> None:
        left = len(self.data) - self.at
        if count * size > left:
            raise self.fail(
                f"{what} {count} needs at least {count * size} bytes at offset "
                f"{self.at}, where {left} are left"
            )

    def scalar(self, code: str, what: str) -> Any:
        self.room(1, struct.calcsize(code), what)
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize(code)
        return value

    def text(self, what: str) -> str:
        length = self.scalar("Q", what)
        self.room(length, 1, f"the length of {what},")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 ({error.reason})") from error

    def value(self, kind: int, what: str) -> Any:
        if kind == 8:
            return self.text(what)
        if kind != 9:
            return self.scalar(self.code(kind, what), what)
        kind, count = self.scalar("I", what), self.scalar("Q", what)
        if kind == 8:
            self.room(count, 8, f"the string count of {what},")
            return [self.text(what) for _ in range(count)]
        code = self.code(kind, what)
        self.room(count, struct.calcsize(code), f"the item count of {what},")
        values = np.frombuffer(self.data, "<" + code, count, self.at).tolist()
        self.at += count * struct.calcsize(code)
        return values

    def code(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            raise self.fail(f"{what} has value type {kind}; known are 0 to 12")
        return _SCALARS[kind]


class GgufFile:
    """Metadata and memory-mapped tensors of one file.

    Raises `LclmError` from the constructor for anything the bytes do not support.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise LclmError(f"{self.path}: no such file; give the path of a .gguf file")
        if self.path.stat().st_size < 24:
            raise LclmError(
                f"{self.path} is {self.path.stat().st_size} bytes; a GGUF header alone "
                "is 24. It is truncated; fetch it again."
            )
        with open(self.path, "rb") as stream:
            self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self._data, self.path)
        tensors, keys = _counts(cursor)
        self.metadata = _metadata(cursor, keys)
        self.tensors = _tensors(cursor, tensors, self._alignment(cursor))

    def _alignment(self, cursor: _Cursor) -> int:
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise cursor.fail(f"general.alignment is {align!r}, not a power of two")
        return align

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A metadata value of the wanted type, `default` where the key is absent."""
        value = self.metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (
            isinstance(value, bool) and kind is not bool
        ):
            raise LclmError(
                f"{self.path}: {key} is {value!r}, not of the expected type"
            )
        return value

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, uint8 [rows..., bytes a row], not copied."""
        t = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, t.nbytes, t.start)
        return flat.reshape(*t.shape[:-1], -1)

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32 (dequantised where it is quantised)."""
        t = self.tensors[name]
        try:
            values = dequantize(self.raw(name), t.kind)
        except NotImplementedError as error:
            raise LclmError(
                f"{self.path}: tensor {name} has type {t.kind.name}, which the gguf "
                "package cannot dequantise; convert the file to Q8_0 or F16"
            ) from error
        return values.astype(np.float32, copy=False).reshape(t.shape)


def _counts(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.data[:4]
    if magic != MAGIC:
        raise cursor.fail(f"it starts with {magic!r} instead of {MAGIC!r}")
    cursor.at = 4
    version = cursor.scalar("I", "the version")
    if version not in VERSIONS:
        raise cursor.fail(f"version {version}; supported are 2 and 3, little-endian")
    tensors = cursor.scalar("Q", "the tensor count")
    keys = cursor.scalar("Q", "the key count")
    cursor.room(tensors, _MIN_TENSOR, "a tensor count of")
    cursor.room(keys, _MIN_KEY, "a key count of")
    return tensors, keys


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text("a metadata key")
        if key in found:
            raise cursor.fail(f"the key {key!r} occurs twice")
        found[key] = cursor.value(cursor.scalar("I", key), key)
    return found


def _tensors(cursor: _Cursor, count: int, align: int) -> dict[str, GgufTensor]:
    entries = []
    for _ in range(count):
        name = cursor.text("a tensor name")
        rank = cursor.scalar("I", name)
        if not 1 <= rank <= 4:
            raise cursor.fail(
                f"tensor {name} has {rank} dimensions; 1 to 4 are allowed"
            )
        dims = tuple(cursor.scalar("Q", name) for _ in range(rank))
        entries.append((name, dims, cursor.scalar("I", name), cursor.scalar("Q", name)))
    base = -(-cursor.at // align) * align
    found: dict[str, GgufTensor] = {}
    for name, dims, kind, offset in entries:
        if name in found:
            raise cursor.fail(f"the tensor {name} occurs twice")
        found[name] = _place(cursor, name, dims, kind, (base, offset, align))
    return found


def _place(
    cursor: _Cursor,
    name: str,
    dims: tuple[int, ...],
    kind: int,
    place: tuple[int, int, int],
) -> GgufTensor:
    base, offset, align = place
    try:
        quant = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise cursor.fail(f"tensor {name} has unknown data type {kind}") from error
    block, size = gguf.GGML_QUANT_SIZES[quant]
    if min(dims) < 1 or dims[0] % block:
        raise cursor.fail(f"tensor {name} has shape {dims}, not blocks of {block}")
    nbytes = math.prod(dims) // block * size
    if offset % align or base + offset + nbytes > len(cursor.data):
        raise cursor.fail(
            f"tensor {name} claims {nbytes} bytes at offset {base + offset}, beyond "
            f"the end or not aligned to {align}"
        )
    return GgufTensor(name, tuple(reversed(dims)), quant, base + offset, nbytes)
