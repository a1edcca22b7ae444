"""Our own folders: lclm.json (the model as data) beside an Orbax tree per layer."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from lclm import processes
from lclm.config import ModelConfig, from_dict, to_dict
from lclm.errors import LclmError
from lclm.hub.bundle import Bundle, check_shapes
from lclm.hub.hf_folder import dense, fill
from lclm.hub.json_file import read_json
from lclm.hub.names import param_shapes
from lclm.hub.tokenizer_files import read_tokenizer, write_tokenizer
from lclm.tree import flatten, nest

CONFIG, PARAMS = "lclm.json", "params"
FORMAT = 1


def save_orbax(folder: str | Path, bundle: Bundle) -> None:
    """Write an lclm checkpoint folder; an existing checkpoint in it is an error.

    Of several processes every one must call it, and finds what the first one wrote.
    """
    folder = Path(folder)
    tree = nest(dense(bundle))
    if (folder / PARAMS).exists():
        raise LclmError(f"{folder} already holds a checkpoint; give another folder")
    processes.meet(f"{folder} is free")
    head = {"format": FORMAT, "config": to_dict(bundle.config)}

    def write(work: Path) -> None:
        ocp.save((work / PARAMS).absolute(), tree)
        if not processes.first():
            return
        (work / CONFIG).write_text(json.dumps(head, indent=2) + "\n")
        if bundle.tokenizer is not None:
            write_tokenizer(work, bundle.tokenizer)

    fill(folder, write, together=True)


def orbax_config(folder: Path) -> ModelConfig:
    """The model description in a checkpoint folder."""
    head = read_json(folder / CONFIG)
    if head.get("format") != FORMAT:
        raise LclmError(
            f"{folder / CONFIG}: format is {head.get('format')!r}; this version reads "
            f"{FORMAT}"
        )
    return from_dict(ModelConfig, head.get("config"), f"{folder / CONFIG}: ")


def load_orbax(folder: Path, *, dtype: Any = None) -> Bundle:
    """Read an lclm checkpoint folder; `dtype` None keeps the stored types."""
    config = orbax_config(folder)
    place = (folder / PARAMS).absolute()
    if not ocp.is_orbax_checkpoint(place):
        raise LclmError(f"{place} is not an Orbax checkpoint; it may be unfinished")
    found = flatten(ocp.metadata(place).metadata)
    check_shapes(
        {p: tuple(m.shape) for p, m in found.items()}, param_shapes(config), str(folder)
    )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        p: jax.ShapeDtypeStruct(
            tuple(m.shape), jnp.dtype(dtype or m.dtype), sharding=device
        )
        for p, m in found.items()
    }
    params = ocp.load(place, nest(target))
    tokenizer = read_tokenizer(folder, bos=config.bos, eos=config.eos)
    return Bundle(config, params, tokenizer, str(folder), folder)
