"""A model given other rotary embeddings: `yarn:factor=4`, weights untouched."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from lclm.config import AttentionSpec, LayerSpec, ModelConfig, RopeSpec, Run
from lclm.errors import LclmError, unknown
from lclm.ops.rope import frequencies
from lclm.shorthand import split, typed
from lclm.specs import ROPE_KINDS, InfiniSpec

EXAMPLE = "yarn:factor=4"


@dataclass(frozen=True)
class Rope:
    """Changes to the rotary embedding of every attention layer; None leaves a field.

    kind: "linear" (PI), "ntk", "yarn", ...; `factor`, `original` and `context` follow
    from each other and the model's trained length where they are not given. "dynamic"
    has no length to end at: a `context` gives it its factor and nothing else.
    """

    kind: str | None = None
    theta: float | None = None
    factor: float | None = None
    context: int | None = None
    original: int | None = None
    attention_factor: float | None = None


def read_rope(value: str | dict | Rope) -> Rope:
    """`linear:factor=4`, or a table with a "name" beside its options, as a `Rope`.

    Raises:
      LclmError: an unknown kind or option, a value that is no number.
    """
    if isinstance(value, Rope):
        return value
    kind, options = split("rope", value, EXAMPLE)
    if kind not in ROPE_KINDS:
        raise unknown("rope", kind, ROPE_KINDS)
    return Rope(kind, **typed("rope", Rope, kind, options))


def with_rope(config: ModelConfig, rope: Rope) -> ModelConfig:
    """The model with this rotary embedding in every layer that has one.

    Raises:
      LclmError: no layer has one, or the change does not suit it.
    """
    seen = []

    def change(mixer: AttentionSpec) -> AttentionSpec:
        if mixer.rope is None:
            return mixer
        new = _changed(mixer.rope, rope)
        frequencies(new, mixer.head_dim)
        seen.append(new)
        return dataclasses.replace(mixer, rope=new)

    changed = map_attention(config, change)
    if not seen:
        raise LclmError(f"rope: no layer of this {config.family} model has one")
    context = rope.context or config.context
    if seen[-1].kind == "dynamic":
        context = seen[-1].context
    elif rope.context is None and rope.factor is not None:
        context = math.floor((rope.original or config.context) * rope.factor)
    return dataclasses.replace(changed, context=context)


def map_attention(
    config: ModelConfig, change: Callable[[AttentionSpec], AttentionSpec]
) -> ModelConfig:
    """The model with every attention spec changed, Infini-attention's included."""

    def layer(spec: LayerSpec) -> LayerSpec:
        mixer = spec.mixer
        if isinstance(mixer, AttentionSpec):
            return dataclasses.replace(spec, mixer=change(mixer))
        if isinstance(mixer, InfiniSpec):
            inner = dataclasses.replace(mixer, attention=change(mixer.attention))
            return dataclasses.replace(spec, mixer=inner)
        return spec

    stack = tuple(
        Run(tuple(layer(s) for s in run.group), run.repeats) for run in config.stack
    )
    return dataclasses.replace(config, stack=stack)


def _changed(old: RopeSpec, change: Rope) -> RopeSpec:
    """One rotary embedding changed; lengths and factor follow where not given.

    The original length is that of the model before the change. The factor of "linear"
    and "ntk" is the least whole one that reaches the new context (arXiv 2309.12307,
    section 3.3), YaRN's and others' the quotient. "dynamic" keeps the trained length as
    its context, as in Hugging Face's configs: from there on it stretches, without end.
    """
    told = {k: v for k, v in dataclasses.asdict(change).items() if v is not None}
    trained = old.context if old.original is None else old.original
    kind = told.get("kind", old.kind)
    if kind != "default":
        told.setdefault("original", trained)
        if "context" not in told and "factor" in told:
            told["context"] = math.floor(told["original"] * told["factor"])
    if "kind" in told and kind != "default" and "factor" not in told:
        ratio = told.get("context", old.context) / told["original"]
        told["factor"] = float(math.ceil(ratio)) if kind in ("linear", "ntk") else ratio
    if kind == "dynamic":
        told |= {"context": told["original"], "original": None}
    return dataclasses.replace(old, **told)
