"""Models in and out: Hugging Face folders, GGUF files, our checkpoints, known names."""

from pathlib import Path
from typing import Any

from lclm.errors import LclmError, did_you_mean
from lclm.hub.bundle import Bundle
from lclm.hub.known import KNOWN, pull
from lclm.hub.tokenizer import ByteTokenizer, Tokenizer

__all__ = [
    "KNOWN",
    "Bundle",
    "ByteTokenizer",
    "Tokenizer",
    "load",
    "pull",
]


def load(source: str | Path, *, dtype: Any = None, packed: str | None = None) -> Bundle:
    """Read a model from a known name, a folder or a .gguf file.

    `dtype` None keeps the stored one (float32 for GGUF). `packed` ("int8", "int4")
    keeps GGUF weights in small integers. Raises `LclmError` for everything unreadable.
    """
    from lclm.hub.gguf_import import load_gguf

    path = Path(source)
    if str(source) in KNOWN and not path.exists():
        path = pull(str(source))
    if path.is_file():
        return load_gguf(path, dtype=dtype, packed=packed)
    raise LclmError(
        f"no model at {str(source)!r}: give a known name ({', '.join(sorted(KNOWN))}), "
        f"a Hugging Face folder, an lclm checkpoint folder or a .gguf file"
        f"{did_you_mean(str(source), KNOWN)}"
    )
