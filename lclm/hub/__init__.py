"""Models in and out: Hugging Face folders, GGUF files, our checkpoints, known names."""

from pathlib import Path
from typing import Any

from lclm.config import ModelConfig
from lclm.errors import LclmError, did_you_mean
from lclm.hub.bundle import Bundle
from lclm.hub.known import KNOWN, pull
from lclm.hub.tokenizer import ByteTokenizer, Tokenizer

__all__ = [
    "KNOWN",
    "Bundle",
    "ByteTokenizer",
    "Tokenizer",
    "describe",
    "load",
    "load_orbax",
    "pull",
    "save_hf",
    "save_orbax",
    "with_adapter",
]


def load(source: str | Path, *, dtype: Any = None, packed: str | None = None) -> Bundle:
    """Read a model from a known name, a folder or a .gguf file.

    `dtype` None keeps the stored one (float32 for GGUF). `packed` ("int8", "int4")
    keeps GGUF weights in small integers. Raises `LclmError` for everything unreadable.
    """
    path = _locate(source)
    if path.is_file():
        from lclm.hub.gguf_import import load_gguf

        return load_gguf(path, dtype=dtype, packed=packed)
    if packed is not None:
        raise LclmError(
            f"packed={packed!r} keeps the small integers of a .gguf file, and {source} "
            "is a folder of plain weights: load it with packed=None"
        )
    if (path / "lclm.json").is_file():
        return load_orbax(path, dtype=dtype)
    from lclm.hub.hf_folder import load_hf

    return load_hf(path, dtype=dtype)


def describe(source: str | Path) -> ModelConfig:
    """The model description of a source, no weights read."""
    path = _locate(source)
    if path.is_file():
        from lclm.hub.gguf_file import GgufFile
        from lclm.hub.gguf_import import gguf_config

        return gguf_config(GgufFile(path))
    if (path / "lclm.json").is_file():
        from lclm.hub.checkpoint import orbax_config

        return orbax_config(path)
    from lclm.hub.hf_config import config_from_hf
    from lclm.hub.json_file import read_json

    return config_from_hf(read_json(path / "config.json"), str(path / "config.json"))


def load_orbax(folder: str | Path, *, dtype: Any = None) -> Bundle:
    """Read a checkpoint folder that `save_orbax` wrote."""
    from lclm.hub.checkpoint import load_orbax as read

    return read(Path(folder), dtype=dtype)


def save_hf(folder: str | Path, bundle: Bundle) -> None:
    """Write a Hugging Face folder: config.json, safetensors, tokenizer files."""
    from lclm.hub.hf_folder import save_hf as write

    write(folder, bundle)


def save_orbax(folder: str | Path, bundle: Bundle) -> None:
    """Write an lclm checkpoint folder: Orbax parameters per layer and lclm.json."""
    from lclm.hub.checkpoint import save_orbax as write

    write(folder, bundle)


def with_adapter(bundle: Bundle, folder: str | Path) -> Bundle:
    """The model with the LoRA adapter of a folder, merged or beside packed weights."""
    from lclm.hub.adapter import with_adapter as apply

    return apply(bundle, folder)


def _locate(source: str | Path) -> Path:
    path = Path(source)
    if str(source) in KNOWN and not path.exists():
        return pull(str(source))
    folder = (path / "config.json").is_file() or (path / "lclm.json").is_file()
    if path.is_file() or folder:
        return path
    what = "a folder without config.json or lclm.json" if path.is_dir() else "not there"
    raise LclmError(
        f"no model at {str(source)!r} ({what}): give a known name "
        f"({', '.join(sorted(KNOWN))}), a Hugging Face folder, an lclm checkpoint "
        f"folder or a .gguf file{did_you_mean(str(source), KNOWN)}"
    )
