"""Adapters as small folders in PEFT's layout: what was trained, and on which base.

adapter_config.json and adapter_model.safetensors carry PEFT's names (`lora_A` is our
`lora_down` [r, in], `lora_B` our `lora_up` [out, r]); norms and embeddings that were
trained whole stand under their own names (`modules_to_save`). base.json adds what PEFT
has no field for: the model description the adapter was trained with.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lclm.config import ModelConfig, from_dict, to_dict
from lclm.errors import LclmError
from lclm.hub.bundle import Bundle
from lclm.hub.hf_folder import fill
from lclm.hub.json_file import read_json
from lclm.hub.names import hf_names
from lclm.models.decoder import param_shapes, untied
from lclm.models.lora import DOWN, UP, LoraSpec
from lclm.ops.int8 import Int8Weight
from lclm.ops.lora import LoraWeight
from lclm.ops.packed import PackedWeight
from lclm.tree import flatten, nest
from lclm.typing import Params

CONFIG, TENSORS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
PACKED = (PackedWeight, Int8Weight)


def save_adapter(
    folder: str | Path,
    trained: Params,
    *,
    config: ModelConfig,
    spec: LoraSpec,
    base: str,
) -> None:
    """Write adapters and other trained parameters (flat, per layer) into a folder.

    config: the model as it is used with the adapter (its rotary embedding). base: where
    the frozen model comes from.
    """
    names = _names(config)
    tensors = {_key(path, names): np.asarray(v) for path, v in trained.items()}
    with_lora = [p.removesuffix(DOWN) for p in trained if p.endswith(DOWN)]
    whole = [p for p in trained if not p.endswith((DOWN, UP))]
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _modules(with_lora, names),
        "modules_to_save": _modules(whole, names) or None,
    }
    told = {"format": 1, "base": base, "config": to_dict(config)}

    def write(work: Path) -> None:
        save_file(tensors, work / TENSORS, metadata={"format": "pt"})
        (work / CONFIG).write_text(json.dumps(peft, indent=2) + "\n")
        (work / BASE).write_text(json.dumps(told, indent=2) + "\n")

    fill(Path(folder), write)


def with_adapter(bundle: Bundle, folder: str | Path) -> Bundle:
    """The model with an adapter: merged, or laid beside weights that are packed.

    An adapter that was trained with a frozen head of its own (embeddings trained, the
    head not) unties a tied model: its head stays the base's table.

    Raises:
      LclmError: no adapter there, a damaged one, or one of another base.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise LclmError(
            f"no adapter at {str(folder)!r}: give a folder with {CONFIG} and {TENSORS}"
        )
    peft = read_json(folder / CONFIG)
    scale = _scale(peft, folder)
    config = _config(bundle, folder)
    tensors = _tensors(folder)
    names = _names(config)
    parted = bundle.config.tied and not config.tied
    flat = flatten(untied(bundle.params) if parted else bundle.params)
    paths = {_key(p + end, names): p + end for p in flat for end in ("", DOWN, UP)}
    found = {paths[key]: v for key, v in tensors.items() if key in paths}
    _check(found, flat, [k for k in tensors if k not in paths], peft, folder)
    for path, value in found.items():
        if path.endswith(DOWN):
            name = path.removesuffix(DOWN)
            up = jnp.asarray(found[name + UP])
            both = LoraWeight(flat[name], jnp.asarray(value), up, scale)
            loose = isinstance(flat[name], PACKED)
            flat[name] = both if loose else both.dequantize(flat[name].dtype)
        elif not path.endswith(UP):
            flat[path] = jnp.asarray(value, flat[path].dtype)
    return Bundle(config, nest(flat), bundle.tokenizer, bundle.source, bundle.folder)


def _names(config: ModelConfig) -> dict[str, str]:
    """Our path -> Hugging Face name without its ending; paths themselves for stacks."""
    try:
        known = hf_names(config, config.family)
    except LclmError:
        known = {}
    found = {}
    for path in param_shapes(config):
        name = known.get(path)
        found[path] = name if isinstance(name, str) else path.replace("/", ".")
    return found


def _key(path: str, names: dict[str, str]) -> str:
    for end, word in ((DOWN, A), (UP, B)):
        if path.endswith(end):
            name = names[path.removesuffix(end)]
            return PREFIX + name.removesuffix(".weight") + word
    return PREFIX + names[path]


def _modules(paths: list[str], names: dict[str, str]) -> list[str]:
    """PEFT's module names: the last word where every such module is meant."""
    chosen = {_module(names[p]) for p in paths}
    every = {_module(name) for name in names.values()}
    found = set()
    for module in chosen:
        word = module.rpartition(".")[2]
        alike = {m for m in every if m.endswith(word)}
        found.add(word if alike <= chosen else module)
    return sorted(found)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _scale(peft: dict[str, Any], folder: Path) -> float:
    if peft.get("peft_type") != "LORA" or peft.get("use_dora"):
        raise LclmError(
            f"{folder / CONFIG}: peft_type is {peft.get('peft_type')!r}; only plain "
            "LORA adapters can be applied"
        )
    rank, alpha = peft.get("r"), peft.get("lora_alpha")
    numbers = isinstance(rank, int) and isinstance(alpha, int | float)
    if not numbers or rank < 1:
        raise LclmError(
            f"{folder / CONFIG}: r={rank!r} and lora_alpha={alpha!r}; expected numbers"
        )
    return alpha / (rank**0.5 if peft.get("use_rslora") else rank)


def _config(bundle: Bundle, folder: Path) -> ModelConfig:
    """The description the adapter was trained with, its parameters the base's."""
    if not (folder / BASE).is_file():
        return bundle.config
    told = read_json(folder / BASE)
    config = from_dict(ModelConfig, told.get("config"), f"{folder / BASE}: ")
    base = bundle.config
    if base.tied and not config.tied:
        base = dataclasses.replace(base, tied=False)
    here, there = param_shapes(base), param_shapes(config)
    if here != there:
        paths = here.keys() | there.keys()
        path = min(p for p in paths if here.get(p) != there.get(p))
        raise LclmError(
            f"the adapter {folder} was trained on {told.get('base')!r}, which is of "
            f"another shape than {bundle.source!r}: {path} is "
            f"{there.get(path, 'not there')} there and {here.get(path, 'not there')} "
            "here; load the adapter's own base"
        )
    return config


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise LclmError(f"{folder / TENSORS} cannot be read: {error}") from error


def _check(
    found: Params, flat: Params, strange: list[str], peft: dict[str, Any], folder: Path
) -> None:
    """Refuse tensors that no parameter has a place for, before any is applied."""
    wrong = [f"{key} names no parameter" for key in strange]
    for path, value in found.items():
        name = path.removesuffix(DOWN).removesuffix(UP)
        *_, rows, columns = (1, *flat[name].shape)
        want: tuple[int, ...] = tuple(flat[name].shape)
        if path.endswith(DOWN):
            want = (peft["r"], columns)
        elif path.endswith(UP):
            want = (rows, peft["r"])
        if tuple(value.shape) != want:
            wrong.append(f"{path} is {tuple(value.shape)}, expected {want}")
        other = {DOWN: UP, UP: DOWN}
        for end, twin in other.items():
            if path.endswith(end) and name + twin not in found:
                wrong.append(f"{path} stands alone")
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise LclmError(
            f"the adapter {folder} does not fit this model: {'; '.join(wrong[:3])}"
            f"{more}. It was made for {peft.get('base_model_name_or_path')!r}: load it "
            "on that"
        )
