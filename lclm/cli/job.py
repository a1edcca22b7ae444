"""From a config file to a frozen job: every typo is an error before any work."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclm.cli.config_file import read_config
from lclm.cli.training_stage import TrainingStage
from lclm.config import from_dict
from lclm.errors import LclmError, did_you_mean
from lclm.evals import EVALS
from lclm.evals.base import Evaluation

ADAPTER = "adapter_model.safetensors"
CHOICE_KEYS = ("dtype", "packed", "quantize", "rope", "adapter")
JOB_KEYS = ("name", "model", "models", *CHOICE_KEYS, "title", "about", "stages")


@dataclass(frozen=True)
class Choice:
    """A model and how it is held: what `lclm.load` takes, "" for its default."""

    source: str
    dtype: str = ""
    packed: str = ""
    quantize: str = ""
    rope: str = ""
    adapter: str = ""

    def options(self) -> dict[str, str]:
        """Keyword arguments of `lclm.load`."""
        return {k: v for k in CHOICE_KEYS if (v := getattr(self, k))}

    def check(self) -> None:
        """Raise LclmError for what can be seen to be wrong without any weights."""
        if self.rope:
            from lclm.models.extend import read_rope

            read_rope(self.rope)
        if self.adapter and not (Path(self.adapter) / ADAPTER).is_file():
            raise LclmError(
                f"adapter {self.adapter!r}: no {ADAPTER} there; a finished "
                "`lclm train` run with `lora` leaves such a folder"
            )

    def words(self) -> str:
        """What makes this model another one, the adapter's weights included."""
        words = [v for k, v in self.options().items() if k != "adapter"]
        if self.adapter:
            data = (Path(self.adapter) / ADAPTER).read_bytes()
            words.append(hashlib.sha256(data).hexdigest()[:12])
        return " ".join(words)


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
    """Models by the name that tables give them, and the stages each goes through.

    A job of one model needs no name for it: its key is "".
    """

    name: str
    models: dict[str, Choice]
    stages: tuple[Stage | TrainingStage, ...]
    title: str = ""
    about: str = ""

    def to_json(self) -> str:
        """The whole job as indented JSON."""
        models = {
            n: {"source": c.source, **c.options()} for n, c in self.models.items()
        }
        data = {"name": self.name, "title": self.title, "models": models}
        data["stages"] = [s.settings() for s in self.stages]
        return json.dumps(data, indent=2)


def scope(choice: Choice, stage: Stage, *, version: str) -> str:
    """What a record must share, besides its key, to be this model's and stage's."""
    told = {n: getattr(stage.evaluation, n) for n in stage.evaluation.SCOPE}
    text = json.dumps([stage.kind, choice.words(), version, told], sort_keys=True)
    return f"{choice.source}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"


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
    for key in ("name", "stages"):
        if not data.get(key):
            raise LclmError(f"the config's {key!r} is missing or empty: it is required")
    for key in (k for k in JOB_KEYS if k not in ("models", "stages")):
        if not isinstance(data.get(key, ""), str):
            raise LclmError(f"the config's {key!r} is {data[key]!r}; expected a string")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", data["name"]):
        raise LclmError(
            f"name {data['name']!r} cannot name a folder: use letters, digits, - and _"
        )
    stages = data["stages"]
    if not isinstance(stages, list | tuple):
        raise LclmError(f"the config's 'stages' is {stages!r}; expected a list")
    return Job(
        data["name"],
        _models(data),
        tuple(_stage(s, i) for i, s in enumerate(stages)),
        title=data.get("title", ""),
        about=data.get("about", ""),
    )


def _models(data: dict[str, Any]) -> dict[str, Choice]:
    """`model` and its options, or `models`, which take from them what they lack."""
    common = {k: data[k] for k in CHOICE_KEYS if data.get(k)}
    if data.get("model"):
        common["source"] = data["model"]
    models = data.get("models", [{"name": ""}])
    if not isinstance(models, list | tuple) or not models:
        raise LclmError(
            f"the config's 'models' is {models!r}; expected a list of tables such as "
            "dict(name='YaRN', rope='yarn:factor=4')"
        )
    found: dict[str, Choice] = {}
    for i, own in enumerate(models):
        where = f"models[{i}]" if "models" in data else "model"
        own = own.to_dict() if hasattr(own, "to_dict") else own
        if not isinstance(own, dict) or not isinstance(own.get("name"), str):
            raise LclmError(f"{where} is {own!r}; expected a table with a 'name'")
        told = {**common, **own}
        name = told.pop("name")
        if name in found:
            raise LclmError(f"two of 'models' have the name {name!r}")
        if "source" not in told:
            raise LclmError(
                "the config's 'model' is missing or empty: it is required, or a "
                "'source' in each of 'models'"
            )
        found[name] = from_dict(Choice, told, f"{where}.")
        found[name].check()
    return found


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
