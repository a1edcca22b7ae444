"""A training run as strict data: what `configs/*.py` turn into before anything runs."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from lclm.config import from_dict, to_dict
from lclm.data.pipeline import DataSpec
from lclm.errors import LclmError, unknown
from lclm.models.extend import Rope
from lclm.models.lora import LoraSpec
from lclm.models.remat import RematSpec
from lclm.specs import LAID

DTYPES = ("float32", "bfloat16")
SINKS, HEADS = ("learned", "zero"), ("trained", "frozen")
SCHEDULES = ("constant", "cosine", "linear", "trapezoid")


def _require(ok: bool, text: str) -> None:
    if not ok:
        raise LclmError(text)


@dataclass(frozen=True)
class ModelSpec:
    """The model a run starts from.

    source: a preset, a known name, or a checkpoint; with `scratch` only its shape is
    taken and the weights are drawn anew. tokenizer: "model" for the source's own,
    "bytes", or a folder with a tokenizer.json. pattern: attention of training only, in
    layers of full attention, `shifted_groups:ratio=0.25`. laid: what static patterns
    are laid on in training, "rows" or "documents" (`AttentionSpec`); None for rows with
    `pattern` and what the model says without. hybrid: layers changed for good with the
    weights kept, `longgen`, `longgen_blocks` or `infini` (`lclm.models.convert`). sink:
    a logit beside the softmax of each head, "learned" or "zero" (arXiv 2309.17453).
    head: of a tied model whose embedding is trained beside frozen parts, "trained" with
    it or "frozen" as a matrix of its own. trains: regular expressions of parameter
    paths that are trained, all where empty and no adapters are asked for.
    """

    source: str
    scratch: bool = False
    tokenizer: str = "model"
    rope: Rope | None = None
    pattern: str | None = None
    laid: str | None = None
    hybrid: str | None = None
    sink: str | None = None
    head: str | None = None
    lora: LoraSpec | None = None
    trains: tuple[str, ...] = ()
    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise unknown("dtype of parameters", self.dtype, DTYPES)
        for name, known in (("laid", LAID), ("sink", SINKS), ("head", HEADS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise unknown(f"model.{name}", value, known)


@dataclass(frozen=True)
class Group:
    """Parameters whose path matches: learning rate times `lr`, own weight decay."""

    match: str
    lr: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) and its schedule, in optimizer steps.

    schedule: after `warmup` steps from 0 to `lr`, "constant"; "cosine" or "linear" down
    to `lr * floor` at the last step; "trapezoid" holds and falls over the last `decay`
    steps, nowhere below `lr * floor`. clip_norm bounds the global norm, clip_value
    every element; None for neither. no_decay: paths that are not decayed.
    """

    lr: float = 3e-4
    schedule: str = "cosine"
    warmup: int = 0
    decay: int = 0
    floor: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    clip_value: float | None = None
    no_decay: tuple[str, ...] = (r"(scale|bias|sink)$", r"^embed/")
    groups: tuple[Group, ...] = ()

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        _require(self.lr > 0, f"lr is {self.lr}; it must be > 0")
        _require(0 <= self.floor <= 1, f"floor is {self.floor}; it is a share, 0..1")
        _require(self.warmup >= 0, f"warmup is {self.warmup} steps; at least 0")
        for name in ("clip_norm", "clip_value"):
            value = getattr(self, name)
            _require(
                value is None or value > 0, f"{name} is {value}; > 0, or None for none"
            )


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes the rest (see `lclm.sharding.make_mesh`).

    context: how attention goes over context_ring, "auto", "ring", "gather" or "halo".
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context_ring: int = 1
    context_ulysses: int = 1
    expert: int = 1
    context: str = "auto"


@dataclass(frozen=True)
class Checkpoints:
    """A checkpoint each `every` steps (0: only at the end), the newest `keep` kept.

    Those whose step is a multiple of `keep_every` are never removed (0: none).
    """

    every: int = 0
    keep: int = 2
    keep_every: int = 0

    def __post_init__(self):
        for name, least in (("every", 0), ("keep", 1), ("keep_every", 0)):
            value = getattr(self, name)
            _require(value >= least, f"checkpoints.{name} is {value}; at least {least}")


@dataclass(frozen=True)
class Sample:
    """A text that the trained model continues at the end of a run."""

    prompt: str
    tokens: int = 128
    temperature: float = 0.8


@dataclass(frozen=True)
class TrainConfig:
    """One run. `batch` rows of `length` tokens make a step, in `accumulate` parts.

    start_from: folder of a finished run whose trained parameters this one begins with,
    and with carry_optimizer its moments too; the schedule and the count of steps begin
    anew. eval_every: steps between looks at `eval_batches` batches of `holdout`;
    the first look is at the model that the run begins with.
    profile: first and last step of a profiler trace in WORKDIR/profile. hugging_face:
    leave WORKDIR/hf beside WORKDIR/model. sample: a text continued at the end.
    """

    name: str
    model: ModelSpec
    data: DataSpec
    steps: int
    batch: int
    length: int
    accumulate: int = 1
    objective: str = "next_token"
    optimizer: Optimizer = field(default_factory=Optimizer)
    compute: str = "bfloat16"
    loss_chunk: int = 512
    scan: bool = True
    remat: RematSpec = field(default_factory=RematSpec)
    mesh: Mesh | None = None
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    start_from: str = ""
    carry_optimizer: bool = False
    holdout: DataSpec | None = None
    eval_every: int = 0
    eval_batches: int = 8
    log_every: int = 10
    profile: tuple[int, ...] = ()
    hugging_face: bool = False
    sample: Sample | None = None
    seed: int = 0
    title: str = ""
    about: str = ""

    def __post_init__(self):
        ones = ("steps", "batch", "length", "accumulate", "log_every", "eval_batches")
        for name in ones:
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}; it must be at least 1")
        self._check_looks()
        _require(
            self.batch % self.accumulate == 0,
            f"batch {self.batch} does not split into accumulate={self.accumulate} "
            "microbatches: make batch a multiple of it",
        )
        if self.compute not in DTYPES:
            raise unknown("compute type", self.compute, DTYPES)

    def _check_looks(self) -> None:
        _require(
            re.fullmatch(r"[\w.-]*\w[\w.-]*", self.name) is not None,
            f"name {self.name!r} cannot name a folder: use letters, digits, - and _",
        )
        _require(self.eval_every >= 0, f"eval_every is {self.eval_every}; at least 0")
        _require(
            not self.eval_every or self.holdout is not None,
            f"eval_every is {self.eval_every}, and there is no holdout to look at: "
            "give holdout=dict(source=...), or eval_every=0",
        )
        _require(
            not self.carry_optimizer or bool(self.start_from),
            "carry_optimizer is set without start_from: name the run to carry from",
        )
        ordered = len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]
        _require(
            not self.profile or ordered,
            f"profile is {self.profile}; give (first step, last step), or () for none",
        )

    def to_json(self) -> dict[str, Any]:
        """The run as plain data; `train_config` reads it back."""
        return to_dict(self)


def train_config(config: Any) -> TrainConfig:
    """A ConfigDict or plain dict, converted strictly."""
    data = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return from_dict(TrainConfig, data)


def replace(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The run with some fields changed, checked again."""
    return dataclasses.replace(config, **changes)
