"""From a config file to a frozen job: every typo is an error before any work."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from lclm.cli.config_file import read_config
from lclm.cli.training_stage import TrainingStage
from lclm.config import from_dict
from lclm.errors import LclmError, did_you_mean
from lclm.evals import EVALS
from lclm.evals.base import Evaluation

JOB_KEYS = ("name", "model", "dtype", "quantize", "title", "about", "stages")


@dataclass(frozen=True)
class Stage:
    """One evaluation of a job, under the name that its section carries."""

    kind: str
    evaluation: Evaluation
    title: str = ""

    def settings(self) -> dict[str, Any]:
        """The stage as plain data."""
        return {"eval": self.kind, **dataclasses.asdict(self.evaluation)}


@dataclass(frozen=True)
class Job:
    """A model and the stages it goes through."""

    name: str
    model: str
    stages: tuple[Stage | TrainingStage, ...]
    dtype: str = ""
    quantize: str = ""
    title: str = ""
    about: str = ""

    def scope(self, stage: Stage, *, version: str) -> str:
        """What a record must share, besides its key, to be this stage's."""
        told = {n: getattr(stage.evaluation, n) for n in stage.evaluation.SCOPE}
        held = " ".join(filter(None, (self.dtype, self.quantize)))
        text = json.dumps([stage.kind, held, version, told], sort_keys=True)
        return f"{self.model}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def to_json(self) -> str:
        """The whole job as indented JSON."""
        kept = ("name", "model", "dtype", "quantize", "title")
        data = {f: getattr(self, f) for f in kept}
        data["stages"] = [s.settings() for s in self.stages]
        return json.dumps(data, indent=2)


def read_job(spec: str) -> Job:
    """The job of `path/to/config.py` or `path/to/config.py:key=value,key=value`.

    Raises:
      LclmError: no such file, no `get_config`, an unknown or mistyped option.
    """
    return to_job(read_config(spec))


def to_job(config: Any) -> Job:
    """A ConfigDict or plain dict, converted strictly."""
    data = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    for key in data:
        if key not in JOB_KEYS:
            raise LclmError(
                f"the config has no field {key!r}: known are {', '.join(JOB_KEYS)}"
                f"{did_you_mean(key, JOB_KEYS)}"
            )
    for key in ("name", "model", "stages"):
        if not data.get(key):
            raise LclmError(f"the config's {key!r} is missing or empty: it is required")
    for key in JOB_KEYS[:-1]:
        if not isinstance(data.get(key, ""), str):
            raise LclmError(f"the config's {key!r} is {data[key]!r}; expected a string")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", data["name"]):
        raise LclmError(
            f"name {data['name']!r} cannot name a folder: use letters, digits, - and _"
        )
    stages = data.pop("stages")
    if not isinstance(stages, list | tuple):
        raise LclmError(f"the config's 'stages' is {stages!r}; expected a list")
    return Job(stages=tuple(_stage(s, i) for i, s in enumerate(stages)), **data)


def _stage(data: Any, index: int) -> Stage | TrainingStage:
    where = f"stages[{index}]"
    data = data.to_dict() if hasattr(data, "to_dict") else data
    if isinstance(data, dict) and "train" in data:
        return from_dict(TrainingStage, data, f"{where}.")
    if not isinstance(data, dict) or "eval" not in data:
        raise LclmError(
            f"{where} is {data!r}; expected a table with 'eval', one of "
            f"{', '.join(EVALS)}, and that evaluation's settings, or with 'train', a "
            "training config"
        )
    settings = {k: v for k, v in data.items() if k not in ("eval", "title")}
    kind = data["eval"]
    evaluation = from_dict(EVALS[kind], settings, f"{where}.")
    return Stage(kind, evaluation, data.get("title", ""))
