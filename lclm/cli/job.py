"""From a config file to a frozen job: every typo is an error before any work."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclm.cli import trained
from lclm.cli.config_file import read_config
from lclm.cli.training_stage import TrainingStage
from lclm.config import from_dict
from lclm.errors import LclmError, did_you_mean
from lclm.evals import EVALS
from lclm.evals.base import Evaluation
from lclm.evals.claims import Claim, told

ADAPTER = "adapter_model.safetensors"
CHOICE_KEYS = ("dtype", "packed", "quantize", "rope", "adapter")
JOB_KEYS = ("name", "model", "models", *CHOICE_KEYS, "title", "about", "size")
JOB_KEYS += ("stages", "claims")
TABLES = ("models", "stages", "claims")
SIZES = ("", "smoke")


@dataclass(frozen=True)
class Choice:
    """A model and how it is held: what `lclm.load` takes, "" for its default.

    train: the training config that makes it, in place of a source.
    """

    source: str = ""
    dtype: str = ""
    packed: str = ""
    quantize: str = ""
    rope: str = ""
    adapter: str = ""
    train: str = ""

    def options(self) -> dict[str, str]:
        """Keyword arguments of `lclm.load`."""
        return {k: v for k in CHOICE_KEYS if (v := getattr(self, k))}

    def check(self) -> None:
        """Raise LclmError for what can be seen to be wrong without any weights."""
        if self.train:
            for key in ("source", "adapter"):
                if value := getattr(self, key):
                    raise LclmError(
                        f"train={self.train!r} with {key}={value!r}: a model that is "
                        "trained here has none; leave one of them out"
                    )
            trained.read_training(self.train)
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
        if self.train:
            words.append(trained.fingerprint(self.train))
        return " ".join(words)


@dataclass(frozen=True)
class Stage:
    """One evaluation of a job, under the name that its section carries."""

    kind: str
    evaluation: Evaluation
    title: str = ""

    @property
    def name(self) -> str:
        """What tables and claims call it."""
        return self.title or self.kind

    def settings(self) -> dict[str, Any]:
        """The stage as plain data."""
        return {"eval": self.kind, **dataclasses.asdict(self.evaluation)}


@dataclass(frozen=True)
class Job:
    """Models by the name that tables give them, and the stages each goes through.

    A job of one model needs no name for it: its key is "". size: "smoke" for one that
    is far smaller than what its claims are about.
    """

    name: str
    models: dict[str, Choice]
    stages: tuple[Stage | TrainingStage, ...]
    title: str = ""
    about: str = ""
    size: str = ""
    claims: tuple[Claim, ...] = ()

    def to_json(self) -> str:
        """The whole job as indented JSON."""
        models = {
            n: {**({"train": c.train} if c.train else {"source": c.source}),
                **c.options()}
            for n, c in self.models.items()
        }  # fmt: skip
        data = {"name": self.name, "title": self.title, "models": models}
        data["stages"] = [s.settings() for s in self.stages]
        if self.size:
            data["size"] = self.size
        if self.claims:
            data["claims"] = [dataclasses.asdict(c) for c in self.claims]
        return json.dumps(data, indent=2)


def scope(choice: Choice, stage: Stage, *, version: str) -> str:
    """What a record must share, besides its key, to be this model's and stage's."""
    told = {n: getattr(stage.evaluation, n) for n in stage.evaluation.SCOPE}
    text = json.dumps([stage.kind, choice.words(), version, told], sort_keys=True)
    made = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{choice.train or choice.source}/{made}"


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
    for key in (k for k in JOB_KEYS if k not in TABLES):
        if not isinstance(data.get(key, ""), str):
            raise LclmError(f"the config's {key!r} is {data[key]!r}; expected a string")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", data["name"]):
        raise LclmError(
            f"name {data['name']!r} cannot name a folder: use letters, digits, - and _"
        )
    if (size := data.get("size", "")) not in SIZES:
        raise LclmError(f"size {size!r}: use 'smoke', or leave it out")
    for key in ("stages", "claims"):
        if not isinstance(data.get(key, []), list | tuple):
            raise LclmError(f"the config's {key!r} is {data[key]!r}; expected a list")
    models = _models(data)
    stages = tuple(_stage(s, i) for i, s in enumerate(data["stages"]))
    claims = tuple(_claim(c, i) for i, c in enumerate(data.get("claims", ())))
    for index, claim in enumerate(claims):
        _check_claim(claim, f"claims[{index}]", models, stages)
    told = {k: data.get(k, "") for k in ("title", "about", "size")}
    return Job(data["name"], models, stages, claims=claims, **told)


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
        if "train" in own and "source" not in own:
            told.pop("source", None)
        if not (told.get("source") or told.get("train")):
            raise LclmError(
                "the config's 'model' is missing or empty: it is required, or a "
                "'source' or 'train' in each of 'models'"
            )
        found[name] = from_dict(Choice, told, f"{where}.")
        found[name].check()
    trained.check(found)
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


def _claim(data: Any, index: int) -> Claim:
    where = f"claims[{index}]"
    data = data.to_dict() if hasattr(data, "to_dict") else data
    if not isinstance(data, dict):
        raise LclmError(f"{where} is {data!r}; expected a table with 'says'")
    if isinstance(data.get("stage"), str):
        data = {**data, "stage": [data["stage"]]}
    try:
        return from_dict(Claim, data, f"{where}.")
    except LclmError as error:
        at = "" if where in str(error) else f"{where}: "
        raise LclmError(f"{at}{error}") from error


def _check_claim(
    claim: Claim, where: str, models: dict[str, Choice], stages: tuple
) -> None:
    """What of a claim can be seen to be wrong before anything is measured."""
    titles = [s.name for s in stages if isinstance(s, Stage)]
    for title in claim.stage:
        if title not in titles:
            raise LclmError(
                f"{where}: no evaluation has the title {title!r}: this job has "
                f"{', '.join(map(repr, titles)) or 'none'}{did_you_mean(title, titles)}"
            )
    mine = [s.evaluation for s in stages
            if isinstance(s, Stage) and s.name in claim.stage]  # fmt: skip
    known: dict[str, Any] = {"stage": claim.stage}
    if set(models) != {""}:
        known["model"] = tuple(models)
    if all(hasattr(e, "readings") for e in mine):
        readings = [r for e in mine for r in e.readings]
        known |= {"cache": tuple(r.name for r in readings)}
        known |= {"label": tuple(r.title for r in readings)}
    elif all(hasattr(e, "caches") for e in mine):
        known["cache"] = tuple(c for e in mine for c in e.caches)
    for picks in (claim.low, claim.high):
        for name, value in picks.items():
            values = value if isinstance(value, list | tuple) else (value,)
            allowed = known.get(name, values)
            for one in (v for v in values if v not in allowed):
                raise LclmError(
                    f"{where}: {told(picks)} picks no record: {name} is one of "
                    f"{', '.join(map(repr, allowed))}{did_you_mean(one, allowed)}"
                )
    for bucket in (getattr(e, "bucket", 0) for e in mine if claim.span):
        if not bucket or any(at % bucket for at in claim.span):
            raise LclmError(
                f"{where}: span {list(claim.span)} needs a perplexity whose bucket "
                f"divides both ends; bucket is {bucket}"
            )
