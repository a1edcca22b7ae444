"""Frozen descriptions of the parts of a layer: mixers, feed-forwards, norms.

Everything here is data. A mixer or feed-forward spec names itself in `TYPE`: the key of
the table that builds it (`lclm.blocks`), and its tag in stored configurations.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from lclm.errors import LclmError, did_you_mean

ROPE_KINDS = (
    "default",
    "linear",
    "ntk",
    "dynamic",
    "dynamic_linear",
    "yarn",
    "yarn_paper",
    "longrope",
    "llama3",
    "proportional",
)
LAYOUTS = ("half", "interleaved")
ANGLES = ("hf", "exact")
LAID = ("documents", "rows")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def _require(ok: bool, text: str) -> None:
    if not ok:
        raise LclmError(text)


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding; field names follow Hugging Face `rope_parameters`.

    `context` is `max_position_embeddings`; `original` is the length the frequencies
    were trained for (`original_max_position_embeddings`), `context` where None.
    """

    kind: str = "default"
    theta: float = 10000.0
    context: int = 8192
    factor: float | None = None
    original: int | None = None
    partial: float = 1.0
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    layout: str = "half"
    angles: str = "hf"

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            hint = did_you_mean(self.kind, ROPE_KINDS)
            raise LclmError(
                f"unknown RoPE type {self.kind!r}: known are {', '.join(ROPE_KINDS)}"
                f"{hint}"
            )
        _require(self.layout in LAYOUTS, f"RoPE layout {self.layout!r}: use {LAYOUTS}")
        _require(self.angles in ANGLES, f"RoPE angles {self.angles!r}: use {ANGLES}")
        _require(self.theta > 0, f"rope_theta is {self.theta}; it must be > 0")
        _require(
            self.factor is None or self.factor > 0,
            f"RoPE factor is {self.factor}; it must be > 0 (1 means no scaling)",
        )
        _require(0 < self.partial <= 1, f"partial_rotary_factor {self.partial}: 0..1")
        _require(self.context >= 1, f"RoPE context is {self.context}; it must be >= 1")

    @property
    def dynamic(self) -> bool:
        """Whether frequencies depend on the current length (keys cached unrotated)."""
        return self.kind in ("dynamic", "dynamic_linear", "longrope")


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query softmax attention. `rope=None` means no position at all.

    `window`: a query sees this many tokens, itself included; None sees all.
    `scale`: multiplies q.k; None is head_dim ** -0.5. `sink`: learned logit per head.
    `sinks`: beside its window a query sees this many first tokens of its document.
    `pattern`: a static pattern in place of a window, "block_sparse:block=64,stride=8".
    `laid`: what a static pattern is laid on where documents are packed: each of the
    "documents", or the "rows" they stand in (a key must then be of the query's document
    as well).
    """

    TYPE: ClassVar[str] = "attention"

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeSpec | None = field(default_factory=RopeSpec)
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sink: bool = False
    sinks: int = 0
    pattern: str | None = None
    laid: str = "documents"

    def __post_init__(self):
        _require(self.laid in LAID, f"pattern laid on {self.laid!r}: use {LAID}")
        _require(
            self.kv_heads >= 1 and self.heads % self.kv_heads == 0,
            f"{self.heads} heads over {self.kv_heads} kv heads: heads must be a "
            "multiple of kv_heads",
        )
        _require(
            self.window is None or self.window >= 1,
            f"attention window is {self.window}; it must be at least 1 token",
        )
        _require(
            self.sinks == 0 or (self.sinks > 0 and self.window is not None),
            f"{self.sinks} attention sinks with window={self.window}: give a count "
            ">= 0, and a window beside which they are seen",
        )
        _require(
            self.pattern is None or self.window is None,
            f"attention pattern {self.pattern!r} with window={self.window}: a pattern "
            "stands in place of a window; leave one of them out",
        )

    @property
    def static(self) -> bool:
        """Whether the layer has a sparse pattern other than a window."""
        return self.sinks > 0 or self.pattern is not None


@dataclass(frozen=True)
class MlpSpec:
    """Gated feed-forward: down(act(gate(x)) * up(x)), `width` hidden units."""

    TYPE: ClassVar[str] = "mlp"

    width: int
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            hint = did_you_mean(self.activation, ACTIVATIONS)
            raise LclmError(
                f"unknown activation {self.activation!r}: known are "
                f"{', '.join(ACTIVATIONS)}{hint}"
            )


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm: x / rms(x) * (scale + offset); Gemma stores scale with offset 1."""

    TYPE: ClassVar[str] = "rms"

    eps: float = 1e-5
    offset: float = 0.0


@dataclass(frozen=True)
class LayerNormSpec:
    """LayerNorm: (x - mean) / std * (scale + 1) + bias."""

    TYPE: ClassVar[str] = "layer"

    eps: float = 1e-5


def _positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        _require(value >= 1, f"{type(spec).__name__}: {name} is {value}; at least 1")


@dataclass(frozen=True)
class MambaSpec:
    """Mamba-1 selective state space (arXiv 2312.00752).

    `inner` channels, `state` numbers each; `conv` taps; `rank` of the step-size
    projection. `inner_norms` adds Jamba's RMSNorms on the step size, B and C, with
    `norm_eps`. `proj_bias` is for the in and out projections.
    """

    TYPE: ClassVar[str] = "mamba"

    inner: int
    rank: int
    state: int = 16
    conv: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    inner_norms: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self):
        _positive(self, "inner", "rank", "state", "conv")


@dataclass(frozen=True)
class Mamba2Spec:
    """Mamba-2 / SSD (arXiv 2405.21060): `heads` of `head_dim`, B and C by group.

    `chunk` is the block of the chunked matrix form; `step_limit` clips step sizes.
    """

    TYPE: ClassVar[str] = "mamba2"

    heads: int
    head_dim: int = 64
    state: int = 128
    groups: int = 1
    conv: int = 4
    chunk: int = 256
    conv_bias: bool = True
    proj_bias: bool = False
    step_limit: tuple[float, float] = (0.0, float("inf"))
    norm_eps: float = 1e-5

    def __post_init__(self):
        _positive(self, "heads", "head_dim", "state", "groups", "conv", "chunk")
        _require(
            self.heads % self.groups == 0,
            f"{self.heads} Mamba-2 heads over {self.groups} groups: heads must be a "
            "multiple of groups",
        )
        _require(
            len(self.step_limit) == 2 and 0 <= self.step_limit[0] <= self.step_limit[1],
            f"Mamba-2 step_limit is {self.step_limit}: give the smallest and the "
            "largest step size, 0 <= smallest <= largest",
        )

    @property
    def inner(self) -> int:
        """Channels."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class MegalodonSpec:
    """Megalodon mixer (arXiv 2404.08801): CEMA, normalised attention inside chunks.

    `z` and `value` are total widths over `heads`; `order` complex states a channel;
    `norm_groups` of the timestep norm. The layer's wiring is "twohop".
    """

    TYPE: ClassVar[str] = "megalodon"

    heads: int
    z: int
    value: int
    chunk: int = 2048
    order: int = 16
    norm_groups: int = 32
    theta: float = 10000.0
    eps: float = 1e-5

    def __post_init__(self):
        _positive(self, "heads", "z", "value", "chunk", "order", "norm_groups")
        for name in ("z", "value"):
            width = getattr(self, name)
            _require(
                width % self.heads == 0,
                f"Megalodon {name} width {width} over {self.heads} heads leaves a rest",
            )


@dataclass(frozen=True)
class InfiniSpec:
    """Infini-attention (arXiv 2404.07143): local attention and a compressive memory.

    `attention` describes the projections and the local part; `segment` tokens share one
    state of the memory. `rule` is "linear" or "delta". `bypass`: while the memory is
    empty the output is the local part alone. `bounded`: RoPE positions restart in every
    segment. `gate`: initial gate logit; sigmoid(gate) is the memory's share.
    """

    TYPE: ClassVar[str] = "infini"

    attention: AttentionSpec
    segment: int = 2048
    rule: str = "delta"
    bypass: bool = True
    bounded: bool = True
    gate: float = 0.0

    def __post_init__(self):
        _positive(self, "segment")
        _require(
            self.rule in ("linear", "delta"),
            f"Infini-attention rule {self.rule!r}: use 'linear' or 'delta'",
        )
        local, rope = self.attention, self.attention.rope
        _require(
            local.window is None and local.pattern is None and not local.sink,
            f"Infini-attention with window={local.window}, pattern={local.pattern!r}, "
            f"sink={local.sink}: its local part sees its whole segment; leave them "
            "out and set segment",
        )
        _require(
            rope is None or not rope.dynamic,
            "Infini-attention with a RoPE type whose angles follow the length: use a "
            "fixed type such as yarn or linear",
        )


@dataclass(frozen=True)
class MoeSpec:
    """Mixture of gated feed-forwards: the `top` of `experts` by softmax probability.

    `renormalise` makes the chosen weights sum to 1 (Mixtral); Jamba leaves them.
    """

    TYPE: ClassVar[str] = "moe"

    width: int
    experts: int
    top: int = 2
    activation: str = "silu"
    renormalise: bool = False

    def __post_init__(self):
        _positive(self, "width", "experts", "top")
        _require(
            self.top <= self.experts,
            f"top {self.top} of {self.experts} experts: there are not so many",
        )


@dataclass(frozen=True)
class FfnSpec:
    """Plain or gated feed-forward of Megalodon: fc2(silu(fc1(x)) [* fc3(x)]).

    `gated` is SwiGLU; `rescale` multiplies the result by a learned vector.
    """

    TYPE: ClassVar[str] = "ffn"

    width: int
    gated: bool = False
    rescale: bool = False

    def __post_init__(self):
        _positive(self, "width")


@dataclass(frozen=True)
class TimestepNormSpec:
    """Cumulative group norm over time (arXiv 2404.08801, section 3.2), with a state."""

    TYPE: ClassVar[str] = "timestep"

    groups: int
    eps: float = 1e-5

    def __post_init__(self):
        _positive(self, "groups")


Mixer = AttentionSpec | MambaSpec | Mamba2Spec | MegalodonSpec | InfiniSpec
FeedForward = MlpSpec | MoeSpec | FfnSpec
