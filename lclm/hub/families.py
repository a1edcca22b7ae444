"""Model families that bring their own reading and writing of files.

The attention families share one reader (`hf_config`, `names`, `gguf_import`); a family
here answers for itself. A name table maps our parameter path to a tensor name, or to
a tuple of names whose tensors are stacked on a new first axis (experts).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lclm.config import ModelConfig
from lclm.errors import unknown
from lclm.hub.gguf_file import GgufFile
from lclm.registry import Entry, Table

Names = dict[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class HfFamily:
    """One Hugging Face `model_type`.

    `config_from_hf(table, where)` reads a config.json and `config_to_hf(config, dtype)`
    writes one; `names(config)` is the name table of the tensors. `rename` turns another
    spelling of a stored tensor name into the one that `names` gives.
    """

    config_from_hf: Callable[[dict[str, Any], str], ModelConfig]
    config_to_hf: Callable[[ModelConfig, str], dict[str, Any]]
    names: Callable[[ModelConfig], Names]
    rename: Callable[[str], str] = str


def _same_shape(
    path: str, shape: tuple[int, ...], config: ModelConfig
) -> tuple[int, ...]:
    return shape


def _same_values(path: str, values: np.ndarray) -> np.ndarray:
    return values


@dataclass(frozen=True)
class GgufFamily:
    """One GGUF `general.architecture`.

    `config(file)` reads the metadata; `names(config)` gives the tensor of each path.
    `shape(path, shape, config)` is the stored shape of a parameter and
    `values(path, stored)` undoes what the file's writer did to its float values.
    """

    config: Callable[[GgufFile], ModelConfig] | None = None
    names: Callable[[ModelConfig], dict[str, str]] | None = None
    shape: Callable[[str, tuple[int, ...], ModelConfig], tuple[int, ...]] = _same_shape
    values: Callable[[str, np.ndarray], np.ndarray] = _same_values


HF = Table(
    "model_type",
    {
        "mamba": Entry("lclm.hub.hf_mamba:FAMILY", "Mamba-1"),
        "mamba2": Entry("lclm.hub.hf_mamba2:FAMILY", "Mamba-2"),
        "jamba": Entry("lclm.hub.hf_jamba:JAMBA", "attention, Mamba and experts"),
        "megalodon": Entry("lclm.hub.hf_megalodon:FAMILY", "complex EMA, chunks"),
        "mixtral": Entry("lclm.hub.hf_jamba:MIXTRAL", "attention and experts"),
        "longgen": Entry("lclm.hub.hf_hybrid:FAMILY", "sparse layers around full ones"),
        "infini": Entry("lclm.hub.hf_hybrid:FAMILY", "a memory beside attention"),
    },
)
GGUF = Table(
    "GGUF architecture",
    {
        "mamba": Entry("lclm.hub.gguf_mamba:FAMILY", "Mamba-1"),
        "mamba2": Entry("lclm.hub.gguf_mamba2:FAMILY", "Mamba-2"),
        "jamba": Entry("lclm.hub.gguf_jamba:FAMILY", "attention, Mamba and experts"),
    },
)


def layer_names(
    paths: Iterable[str], top: dict[str, str], layer: dict[str, str], prefix: str
) -> dict[str, str]:
    """Path -> tensor name: `top` whole, `layers_i/x` as `prefix` of i and `layer[x]`.

    Raises `LclmError` for a parameter that the format has no name for.
    """
    names = {}
    for path in paths:
        first, _, rest = path.partition("/")
        if path in top:
            names[path] = top[path]
        elif rest in layer:
            index = first.removeprefix("layers_")
            names[path] = prefix.format(index) + layer[rest]
        else:
            raise unknown("parameter for this file format", path, [*top, *layer])
    return names
