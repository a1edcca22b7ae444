"""Models of a job that are trained for it: once, in its folder, read ever after."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lclm.cli.page import Section
from lclm.errors import LclmError, did_you_mean
from lclm.evals.base import Panel, Summary
from lclm.evals.figures import Chart, smooth

MODELS = "{models}"  # the folder of the models that a job trains
COLUMNS = ("model", "steps", "tokens", "loss", "held-out loss", "tokens/s", "seconds")


def folder_name(name: str) -> str:
    """The folder of a model: its name, what cannot stand in a path as a dash."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def check(models: Mapping[str, Any]) -> None:
    """Raise LclmError where two models would be trained in one folder, or a source is
    a model that this job does not train."""
    names = [name for name, choice in models.items() if choice.train]
    known = [f"{MODELS}/{folder_name(name)}/model" for name in names]
    for name, choice in models.items():
        if MODELS in choice.source and choice.source not in known:
            raise LclmError(
                f"model {name!r}: source {choice.source!r} is none that this job "
                f"trains: {', '.join(known) or 'it trains none'}"
                f"{did_you_mean(choice.source, known)}"
            )
    for i, name in enumerate(names):
        for other in names[:i]:
            if folder_name(name) == folder_name(other):
                raise LclmError(
                    f"models {other!r} and {name!r} would both be trained in "
                    f"models/{folder_name(name)}: let their names differ in letters"
                )


def read_training(spec: str) -> Any:
    """The training run of a config, as `lclm train --config` reads it."""
    from lclm.cli.config_file import read_config
    from lclm.train.config import train_config

    return train_config(read_config(spec))


def fingerprint(spec: str) -> str:
    """What changes when the training run does."""
    told = json.dumps(read_training(spec).to_json(), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def train(spec: str, folder: Path, console: Console) -> Path:
    """The trained model's folder; an unfinished run goes on, a finished one is read."""
    from lclm.cli import train as training
    from lclm.train.stop import Stopped

    if (folder / "model").is_dir():
        from lclm.cli.workdir import check_same

        check_same(folder, read_training(spec))
        return folder / "model"
    try:
        return training.run(spec, workdir=folder, console=console)
    except Stopped as stop:
        raise KeyboardInterrupt from stop


def train_all(
    models: Mapping[str, Any], folder: Path, console: Console
) -> tuple[dict[str, Any], list[Section]]:
    """The models with what was trained as their source, and how training went.

    `{models}` in a training config's settings or in a source is `folder`, so that a
    model may start from another of its job, `train.py:start={models}/base/model`, or be
    another held otherwise: `source="{models}/base/model"` and a `rope`.
    """
    found, folders = {}, {}
    for name, choice in models.items():
        choice = dataclasses.replace(
            choice, source=choice.source.replace(MODELS, str(folder))
        )
        if choice.train:
            folders[name] = folder / folder_name(name)
            spec = choice.train.replace(MODELS, str(folder))
            made = train(spec, folders[name], console)
            choice = dataclasses.replace(choice, source=str(made))
        found[name] = choice
    return found, [_section(folders)] if folders else []


def _section(folders: Mapping[str, Path]) -> Section:
    from lclm.train.records import JOURNAL, read_journal

    rows, lines = [], {}
    for name, folder in folders.items():
        told = json.loads((folder / "train.json").read_text())
        records = read_journal(folder / JOURNAL)
        steps = [r for r in records if "event" not in r]
        looks = [r["nll"] for r in records if r.get("event") == "eval"]
        rates = sorted(r["tokens_per_second"] for r in steps)
        tokens = told["batch"] * told["length"]
        last = steps[-1]["step"]
        rows.append((
            name,
            f"{last:,}",
            f"{last * tokens:,}",
            f"{steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}",
            f"{looks[-1]:.3f}" if looks else "-",
            f"{rates[len(rates) // 2]:,.0f}",
            f"{sum(tokens / rate for rate in rates) * last / len(steps):,.0f}",
        ))  # fmt: skip
        loss = smooth(np.asarray([r["loss"] for r in steps], np.float64))
        at = np.asarray([r["step"] for r in steps], np.float64)
        lines[name] = np.stack([at, loss, loss, loss], axis=1)
    highest = max(float(rows[:, 1].max()) for rows in lines.values())
    chart = Chart(
        "Training loss (moving mean)", lines, "step", "nats per token",
        (0.0, 1.05 * highest),
    )  # fmt: skip
    panel = Panel("Trained for this run", COLUMNS, tuple(rows))
    return Section.of(Summary((panel,), {"training_loss.png": chart}))
