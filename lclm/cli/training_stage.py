"""The training stage of a job: a run stopped half way, resumed, exported, sampled."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lclm.cli.page import Section
from lclm.evals.base import Panel, Summary
from lclm.evals.figures import Chart


@dataclass(frozen=True)
class TrainingStage:
    """`train`: a training config, as `lclm train --config` takes it.

    With `halves` the run is stopped half way and goes on from its checkpoint.
    """

    train: str
    title: str = ""
    halves: bool = True

    def settings(self) -> dict[str, Any]:
        """The stage as plain data."""
        return dataclasses.asdict(self)


def run_training(stage: TrainingStage, folder: Path, console: Console) -> Section:
    """Train in `folder` (a finished run is only read), and show how it went."""
    from lclm.cli import train
    from lclm.cli.config_file import read_config
    from lclm.train.config import train_config
    from lclm.train.stop import Stopped

    run = train_config(read_config(stage.train))
    began = (folder / "checkpoints").exists() or (folder / "model").exists()
    if stage.halves and not began and run.steps > 1:
        try:
            train.run(
                stage.train, workdir=folder, until=run.steps // 2, console=console
            )
        except Stopped as stop:
            if stop.number is not None:
                raise KeyboardInterrupt from stop
            console.print(f"{stop}: going on from the checkpoint")
    train.run(stage.train, workdir=folder, console=console)
    return _section(stage, run, folder)


def _section(stage: TrainingStage, run: Any, folder: Path) -> Section:
    from lclm.train.records import JOURNAL, read_journal

    records = read_journal(folder / JOURNAL)
    steps = [r for r in records if "event" not in r]
    sittings = [r["step"] for r in records if r.get("event") == "start"]
    first, last = steps[0], steps[-1]
    rates = sorted(r["tokens_per_second"] for r in steps)
    rows = [
        ("steps", f"{last['step']:,} of {run.batch:,} x {run.length:,} tokens"),
        ("loss, nats a token", f"{first['loss']:.3f} to {last['loss']:.3f}"),
        ("tokens a second", f"{rates[len(rates) // 2]:,.0f}"),
        ("begun or resumed at step", ", ".join(str(s) for s in sittings)),
        ("left in", ", ".join(p.name for p in sorted(folder.iterdir()))),
    ]
    if (folder / "sample.txt").exists():
        rows.append(("sample", (folder / "sample.txt").read_text().strip()))
    title = stage.title or run.title or run.name
    note = f"config {Path(stage.train).name}"
    panel = Panel(title, ("training", "found"), tuple(rows), note=note)
    return Section.of(Summary((panel,), {"loss.png": _curve(records)}), title)


def _curve(records: list[dict[str, Any]]) -> Chart:
    """Training and held-out loss by step."""
    told = {
        "training loss": [(r["step"], r["loss"]) for r in records if "event" not in r],
        "held-out loss": [
            (r["step"], r["nll"]) for r in records if r.get("event") == "eval"
        ],
    }
    lines = {name: np.asarray([(x, y, y, y) for x, y in points], np.float64)
             for name, points in told.items() if points}  # fmt: skip
    highest = max(float(rows[:, 1].max()) for rows in lines.values())
    limits = (0.0, 1.05 * highest)
    return Chart("Loss by step", lines, "step", "nats per token", limits)
