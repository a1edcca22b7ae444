"""What a run leaves for `lclm compare`: run.json says which records are its results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclm.cli.job import Job, Stage
from lclm.config import from_dict
from lclm.data.fetch import write_atomic
from lclm.errors import LclmError
from lclm.evals import EVALS
from lclm.evals.base import KEY, Record, key_of, read_records

RUN, JOURNAL = "run.json", "metrics.jsonl"
NEEDED = ("title", "command", "config", "facts", "stages")


@dataclass(frozen=True)
class Measured:
    """An evaluation that was run on every model of a job, and its records by model.

    trained: tokens, the shortest context that one of the models was trained for.
    """

    stage: Stage
    records: Mapping[str, Sequence[Record]]
    trained: int

    def named(self) -> list[Record]:
        """All records; those of one of several models carry its name as "model"."""
        return [
            {**record, "model": name} if name else record
            for name, its in self.records.items()
            for record in its
        ]

    def to_json(self) -> dict[str, Any]:
        """The stage, and the scope and keys of its records in the journal."""
        settings = self.stage.settings()
        models = {
            name: {
                "scope": its[0]["scope"] if its else "",
                "keys": [key_of(r) for r in its],
            }
            for name, its in self.records.items()
        }
        told = {"eval": settings.pop("eval"), "title": self.stage.title}
        return {**told, "settings": settings, "trained": self.trained, "models": models}


@dataclass(frozen=True)
class Run:
    """A run of `lclm run` or `lclm eval`: what made it, where, and what it measured."""

    title: str
    command: str
    config: Mapping[str, Any]
    facts: Mapping[str, str]
    stages: Sequence[Measured]

    def write(self, folder: Path) -> None:
        """Leave run.json beside the journal."""
        data = {
            "title": self.title,
            "command": self.command,
            "config": self.config,
            "facts": dict(self.facts),
            "stages": [stage.to_json() for stage in self.stages],
        }
        write_atomic(folder / RUN, json.dumps(data) + "\n")


def run_of(job: Job, command: str, facts: Mapping[str, str], stages: list) -> Run:
    """The run of a job, as far as it has come."""
    config = json.loads(job.to_json())
    return Run(job.title or job.name, command, config, facts, tuple(stages))


def read_run(folder: Path) -> Run:
    """The run that a folder holds.

    Raises:
      LclmError: no folder, none of a finished evaluation, or a damaged one.
    """
    path = folder / RUN
    if not path.is_file():
        raise LclmError(f"{str(folder)!r} is not the folder of a run: {_why(folder)}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        told = {name: data[name] for name in NEEDED}
        known = {(r.get("scope", ""), *key_of(r)): r
                 for r in read_records(folder / JOURNAL)[0]}  # fmt: skip
        stages = tuple(_measured(stage, known) for stage in told.pop("stages"))
    except LclmError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LclmError(
            f"{path} is damaged ({type(error).__name__}: {error}); the run's command "
            "writes it again and measures nothing anew"
        ) from error
    return Run(**told, stages=stages)


def _measured(data: dict[str, Any], known: Mapping[tuple, Record]) -> Measured:
    stage = Stage(
        data["eval"], from_dict(EVALS[data["eval"]], data["settings"]), data["title"]
    )
    records: dict[str, list[Record]] = {}
    for name, of in data["models"].items():
        keys = [(of["scope"], *key) for key in of["keys"]]
        lost = [key for key in keys if key not in known]
        if lost:
            raise LclmError(
                f"{len(lost)} of {len(keys)} records that {RUN} names are not in "
                f"{JOURNAL} (first: {dict(zip(KEY, lost[0][1:], strict=True))}); the "
                "run's command measures them again"
            )
        records[name] = [known[key] for key in keys]
    return Measured(stage, records, data["trained"])


def _why(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder; runs are in runs/"
    if (folder / "train.json").is_file():
        return "it holds a training run; compare takes those of lclm run and lclm eval"
    if (folder / JOURNAL).is_file():
        return (
            f"it has records and no {RUN}, so it stopped before its first stage ended, "
            "or an older lclm made it; its command again writes one"
        )
    return f"it has no {RUN}; `lclm run` and `lclm eval` write one"
