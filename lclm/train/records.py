"""What a run leaves to read: metrics.jsonl, TensorBoard events, a loss curve."""

import json
import os
from pathlib import Path
from typing import Any

from lclm.data.fetch import write_atomic

JOURNAL = "metrics.jsonl"
SITTINGS = ("start", "checkpoint_failed")
"""Events that tell of the process, not of the training: they repeat on a resume."""


class Journal:
    """Records of a run, one JSON object a line.

    Opened at step `start`, it is cut back to what was known then. A line that cannot
    be written (a full disk) waits in memory for the next one.
    """

    def __init__(self, path: Path, *, start: int = 0):
        kept = [r for r in read_journal(path) if r.get("step", 0) <= start]
        if not start:  # the first look at held-out text is taken again
            kept = [r for r in kept if r.get("event") != "eval"]
        write_atomic(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = open(path, "ab", buffering=0)
        self._waiting = b""

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and hand it to the system."""
        self._waiting += (json.dumps(record) + "\n").encode()
        try:
            while self._waiting:
                written = self._file.write(self._waiting)
                self._waiting = self._waiting[written:]
        except OSError:
            return  # the rest is tried again with the next record

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError:
            return

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a journal up to a line that a crash cut short."""
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict):
            break
        found.append(record)
    return found


class Records:
    """A journal and TensorBoard events of the same numbers, in a run's folder."""

    def __init__(self, folder: Path, *, start: int = 0):
        from tensorboardX import SummaryWriter

        self.journal = Journal(folder / JOURNAL, start=start)
        self._events = SummaryWriter(
            str(folder / "events"), purge_step=start + 1, flush_secs=30
        )

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, record: dict[str, Any]) -> None:
        """One line, and one point for each of its numbers."""
        self.journal.write(record)
        if record.get("event") in SITTINGS:
            return
        group = record.get("event", "train")
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._events.add_scalar(f"{group}/{name}", value, record["step"])

    def sync(self) -> None:
        """Bring the journal to the disk."""
        self.journal.sync()

    def close(self) -> None:
        """Close both."""
        self.journal.close()
        self._events.close()


class Unrecorded:
    """The records of a process that leaves them to another."""

    def __enter__(self) -> "Unrecorded":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def write(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""


def loss_curve(folder: Path, *, title: str) -> Path | None:
    """Draw loss and learning rate into `folder`/loss.png, with the numbers in loss.csv
    beside it; None without records."""
    from matplotlib.figure import Figure

    records = read_journal(folder / JOURNAL)
    steps = [r for r in records if "event" not in r and "loss" in r]
    held = [r for r in records if r.get("event") == "eval"]
    if not steps:
        return None
    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    at = [r["step"] for r in steps]
    axes.plot(at, [r["loss"] for r in steps], color="#2563eb", label="training loss")
    if held:
        x, y = [r["step"] for r in held], [r["nll"] for r in held]
        axes.plot(x, y, "o-", color="#e0592a", markersize=4, label="held-out loss")
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    rate = axes.twinx()
    rate.plot(at, [r["lr"] for r in steps], color="#8a94a0", linewidth=0.8)
    rate.set_ylabel("learning rate", color="#8a94a0")
    rate.spines[["top"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(folder / "loss.png", dpi=130)
    rows = ["step,loss,learning_rate,held_out_loss"]
    rows += [f"{r['step']},{r['loss']},{r['lr']}," for r in steps]
    rows += [f"{r['step']},,,{r['nll']}" for r in held]
    write_atomic(folder / "loss.csv", "\n".join(rows) + "\n")
    return folder / "loss.png"
