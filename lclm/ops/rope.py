"""Rotary position embedding (RoPE, arXiv 2104.09864) and its context extensions.

R is the number of rotated channel pairs: `head_dim * partial / 2`. Frequencies known
before the run are computed by numpy in float32, operation by operation as Hugging Face
does, so that they agree to the last bits; those that follow a traced length use
jax.numpy. The spellings of Hugging Face configs live in `lclm/ops/rope_hf.py`.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np

from lclm.config import RopeSpec
from lclm.errors import LclmError
from lclm.ops.precision import wide
from lclm.ops.rope_hf import rope_from_hf, rope_to_hf
from lclm.typing import Array, Float, Int

__all__ = ["angles", "frequencies", "rope_from_hf", "rope_to_hf", "rotate"]

LOW_BITS, MIDDLE_BITS = 10, 11  # exact mode: p = 2**21 * g + 2**10 * h + l
HIGH = 1 << (31 - LOW_BITS - MIDDLE_BITS)  # g runs over -HIGH .. HIGH - 1

Length = int | np.integer | np.ndarray | Array | None
Frequencies = Float[Array | np.ndarray, "*B R"]


def frequencies(
    spec: RopeSpec, head_dim: int, length: Length = None
) -> tuple[Frequencies, float]:
    """Inverse frequencies in radians per token, and the factor on cos and sin.

    `length` (tokens seen so far; an int, or a traced scalar or [B] array) matters to
    the dynamic kinds only; None means a text no longer than the original context. A [B]
    length gives one row of frequencies per row of the batch. Raises LclmError where
    the spec lacks a number its kind needs. Sources: arXiv 2306.15595 (linear),
    2309.00071 (NTK, YaRN), 2402.13753 (longrope), 2407.21783 (llama3).
    """
    _check(spec, head_dim)
    if spec.dynamic and _traced(length):
        return _following(spec, head_dim, jnp.asarray(length)), _attention_factor(spec)
    known = int(length) if spec.dynamic and length is not None else None
    return _known(spec, head_dim, known, np.float32), _attention_factor(spec)


def angles(
    positions: Int[Array | np.ndarray, "B T"],
    spec: RopeSpec,
    head_dim: int,
    length: Length = None,
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Float32 cos and sin of position x frequency, times the attention factor.

    Where the kind is dynamic and `length` is None, each row's length is its own largest
    position + 1 (Hugging Face takes the batch's, which couples rows). `exact` angles
    keep the error below 3e-7 at every int32 position; `hf` ones repeat the
    float32 product of Hugging Face, off by 6e-2 at one million.
    """
    positions = jnp.asarray(positions, jnp.int32)
    if spec.dynamic and length is None:
        length = positions.max(axis=-1) + 1
    if spec.angles == "exact":
        _check(spec, head_dim)
        cos, sin = _exact(positions, spec, head_dim, length)
        factor = _attention_factor(spec)
    else:
        inverse, factor = frequencies(spec, head_dim, length)
        inverse = jnp.asarray(inverse)
        if inverse.ndim == 2:
            inverse = inverse[:, None, :]
        product = positions.astype(jnp.float32)[..., None] * inverse
        cos, sin = jnp.cos(product), jnp.sin(product)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(
    x: Float[Array, "B T heads H"],
    cos: Float[Array, "#B #T R"],
    sin: Float[Array, "#B #T R"],
    layout: str = "half",
) -> Float[Array, "B T heads H"]:
    """Turn channel pairs by the given angles in float32; channels past 2R pass through.

    Pairs are (i, i + R) in the `half` layout of Hugging Face and (2i, 2i + 1) in the
    `interleaved` one of Meta's checkpoints (arXiv 2104.09864, equation 34).
    """
    pairs = cos.shape[-1]
    if 2 * pairs > x.shape[-1]:
        raise LclmError(
            f"RoPE tables rotate {2 * pairs} channels but heads have {x.shape[-1]}: "
            "build them with the same head_dim"
        )
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = wide(x[..., : 2 * pairs])
    if layout == "half":
        first, second = turned[..., :pairs], turned[..., pairs:]
        parts = [first * cos - second * sin, second * cos + first * sin]
        turned = jnp.concatenate(parts, axis=-1)
    elif layout == "interleaved":
        first, second = turned[..., 0::2], turned[..., 1::2]
        parts = [first * cos - second * sin, second * cos + first * sin]
        turned = jnp.stack(parts, axis=-1).reshape(turned.shape)
    else:
        raise LclmError(f"RoPE layout {layout!r}: use 'half' or 'interleaved'")
    turned = turned.astype(x.dtype)
    if 2 * pairs == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., 2 * pairs :]], axis=-1)


def _traced(length: Length) -> bool:
    return length is not None and not isinstance(length, int | np.integer)


def _width(spec: RopeSpec, head_dim: int) -> int:
    """Rotated channels; `proportional` spans the head and zeroes the tail instead."""
    return head_dim if spec.kind == "proportional" else int(head_dim * spec.partial)


def _original(spec: RopeSpec) -> int:
    return spec.context if spec.original is None else spec.original


def _scale(spec: RopeSpec) -> float:
    """The extension factor, derived from the two lengths where it is not given."""
    if spec.factor is not None:
        return float(spec.factor)
    return spec.context / _original(spec)


def _check(spec: RopeSpec, head_dim: int) -> None:
    """Raise LclmError for numbers that `spec.kind` cannot work with."""
    kind, width = spec.kind, _width(spec, head_dim)

    def require(ok: bool, text: str) -> None:
        if not ok:
            raise LclmError(f"RoPE {kind}: {text}")

    require(
        width >= 2 and width % 2 == 0,
        f"head_dim {head_dim} x partial {spec.partial} rotates {width} channels; it "
        "must be an even number >= 2",
    )
    if kind in ("linear", "ntk", "dynamic", "llama3"):
        require(spec.factor is not None, "factor is missing; give a number > 0")
    if kind in ("ntk", "dynamic"):
        require(width > 2, f"it rotates {width} channels; NTK scaling needs at least 4")
        require(spec.theta > 1, f"theta is {spec.theta}; it must be > 1")
    require(_original(spec) >= 1, f"original length is {spec.original}; at least 1")
    if kind in ("yarn", "yarn_paper"):
        fast, slow = _betas(spec)
        require(
            fast > slow > 0,
            f"beta_fast is {fast} and beta_slow {slow}; need beta_fast > beta_slow > 0",
        )
        require(spec.theta > 1, f"theta is {spec.theta}; it must be > 1")
    if kind == "llama3":
        low, high = spec.low_freq_factor, spec.high_freq_factor
        require(
            low is not None and high is not None and high > low > 0,
            f"low_freq_factor is {low} and high_freq_factor {high}; both are needed, "
            "with high > low > 0",
        )
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            values = getattr(spec, name)
            require(
                values is not None and len(values) == width // 2,
                f"{name} has {len(values or ())} numbers; it needs {width // 2}, one "
                "per rotated pair",
            )
            require(min(values) > 0, f"{name} holds {min(values)}; all must be > 0")
        require(
            _scale(spec) <= 1 or _original(spec) > 1,
            f"original length is {_original(spec)}; extending needs more than 1",
        )


def _betas(spec: RopeSpec) -> tuple[float, float]:
    """YaRN's cut points in rotations; 0 and None both mean the default."""
    return float(spec.beta_fast or 32), float(spec.beta_slow or 1)


def _attention_factor(spec: RopeSpec) -> float:
    """The number that multiplies cos and sin, so that logits scale by its square."""
    if spec.attention_factor is not None:
        return float(spec.attention_factor)
    scale = _scale(spec)
    if spec.kind in ("yarn", "yarn_paper"):

        def magnitude(weight: float) -> float:
            return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

        if spec.mscale and spec.mscale_all_dim:
            return magnitude(spec.mscale) / magnitude(spec.mscale_all_dim)
        return magnitude(1.0)
    if spec.kind == "longrope" and scale > 1:
        return math.sqrt(1 + math.log(scale) / math.log(_original(spec)))
    return 1.0


def _powers(theta: float, width: int, dtype: type) -> np.ndarray:
    return theta ** (np.arange(0, width, 2).astype(dtype) / width)


def _raised(spec: RopeSpec, width: int, growth: float) -> float:
    """Base under NTK scaling: theta * growth ** (dim / (dim - 2)) (2309.00071, 16)."""
    return float(spec.theta) * growth ** (width / (width - 2))


@functools.lru_cache(maxsize=256)
def _known(spec: RopeSpec, head_dim: int, length: int | None, dtype) -> np.ndarray:
    """Frequencies [R] for a length known on the host, in `dtype` throughout."""
    kind, width = spec.kind, _width(spec, head_dim)
    theta = spec.theta
    if kind == "ntk":
        theta = _raised(spec, width, spec.factor)
    elif kind == "dynamic":
        ratio = max(length or 0, spec.context) / spec.context
        theta = _raised(spec, width, spec.factor * ratio - (spec.factor - 1))
    powers = _powers(theta, width, dtype)
    inverse = 1 / powers
    if kind == "linear":
        inverse = inverse / spec.factor
    elif kind == "dynamic_linear":
        inverse = inverse / max(1.0, (length or 0) / _original(spec))
    elif kind == "yarn":
        low, high = _yarn_range(spec, width)
        ramp = (np.arange(width // 2, dtype=dtype) - low) / (high - low)
        keep = 1 - np.clip(ramp, 0, 1)
        inverse = 1 / (_scale(spec) * powers) * (1 - keep) + inverse * keep
    elif kind == "yarn_paper":
        fast, slow = _betas(spec)
        rotations = _original(spec) * inverse / (2 * math.pi)
        keep = np.clip((rotations - slow) / (fast - slow), 0, 1)
        inverse = inverse / _scale(spec) * (1 - keep) + inverse * keep
    elif kind == "longrope":
        stretch = spec.long_factor if _is_long(spec, length) else spec.short_factor
        inverse = 1 / (np.asarray(stretch, dtype) * powers)
    elif kind == "llama3":
        inverse = _llama3(spec, inverse)
    elif kind == "proportional":
        turning = int(spec.partial * head_dim // 2)
        inverse = np.where(np.arange(width // 2) < turning, inverse, 0)
        inverse = inverse / (1.0 if spec.factor is None else spec.factor)
    inverse = inverse.astype(dtype)
    inverse.flags.writeable = False
    return inverse


def _is_long(spec: RopeSpec, length: int | None) -> bool:
    return (length or 0) > _original(spec)


def _yarn_range(spec: RopeSpec, width: int) -> tuple[float, float]:
    """Channel indices between which YaRN's released code blends, as Hugging Face."""

    def channel(rotations: float) -> float:
        turns = _original(spec) / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(spec.theta))

    low, high = (channel(beta) for beta in _betas(spec))
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(float(low), 0.0), min(float(high), width - 1.0)
    return low, high + 0.001 if low == high else high


def _llama3(spec: RopeSpec, inverse: np.ndarray) -> np.ndarray:
    """Long waves divided, short ones kept, a blend between (arXiv 2407.21783)."""
    original, low, high = _original(spec), spec.low_freq_factor, spec.high_freq_factor
    waves = 2 * math.pi / inverse
    divided = np.where(waves > original / low, inverse / spec.factor, inverse)
    smooth = (original / waves - low) / (high - low)
    blend = (1 - smooth) * divided / spec.factor + smooth * divided
    between = (waves >= original / high) & (waves <= original / low)
    return np.where(between, blend, divided)


def _following(spec: RopeSpec, head_dim: int, length: Array) -> Array:
    """Frequencies [*length.shape, R] for a traced length, each row on its own."""
    width = _width(spec, head_dim)
    length = length[..., None]
    short = jnp.asarray(_known(spec, head_dim, None, np.float32))
    if spec.kind == "longrope":
        long = _known(spec, head_dim, _original(spec) + 1, np.float32)
        return jnp.where(length > _original(spec), jnp.asarray(long), short)
    if spec.kind == "dynamic_linear":
        original = _original(spec)
        return short / jnp.maximum(1.0, length.astype(jnp.float32) / original)
    excess = jnp.maximum(length - spec.context, 0).astype(jnp.float32)
    # theta'**(-2i/dim) = theta**(-2i/dim) * growth**(-2i/(dim-2)): precise near 1
    exponent = np.arange(0, width, 2).astype(np.float32) / (width - 2)
    growth = jnp.log1p(excess * (spec.factor / spec.context))
    return short * jnp.exp(-growth * exponent)


@functools.lru_cache(maxsize=16)
def _tables(
    spec: RopeSpec, head_dim: int, lengths: tuple[int | None, ...]
) -> tuple[np.ndarray, ...]:
    """Cos and sin [lengths, entries, 2R] of the low, middle and high position parts."""
    inverse = [_known(spec, head_dim, length, np.float64) for length in lengths]
    inverse = np.stack(inverse)[:, None, :]
    parts = (
        np.arange(1 << LOW_BITS),
        np.arange(1 << MIDDLE_BITS) << LOW_BITS,
        np.arange(-HIGH, HIGH) << (LOW_BITS + MIDDLE_BITS),
    )
    products = [part[None, :, None].astype(np.float64) * inverse for part in parts]
    pairs = [np.concatenate([np.cos(a), np.sin(a)], axis=-1) for a in products]
    return tuple(pair.astype(np.float32) for pair in pairs)


def _exact(
    positions: Array, spec: RopeSpec, head_dim: int, length: Length
) -> tuple[Array, Array]:
    """Cos and sin by angle addition over float64 host tables, rounded once each."""
    which = jnp.int32(0)
    lengths: tuple[int | None, ...] = (None,)
    if spec.dynamic and not _traced(length):
        lengths = (None if length is None else int(length),)
    elif spec.kind == "longrope":
        lengths = (None, _original(spec) + 1)
        which = (jnp.asarray(length) > _original(spec)).astype(jnp.int32)
    elif spec.dynamic:
        raise LclmError(
            f"RoPE {spec.kind} with angles='exact' needs a length known before the "
            "run, but it follows the text here: use angles='hf', or pass an int length"
        )
    if which.ndim:
        which = which[:, None]
    low, middle, high = _tables(spec, head_dim, lengths)
    at_low = positions & ((1 << LOW_BITS) - 1)
    at_middle = (positions >> LOW_BITS) & ((1 << MIDDLE_BITS) - 1)
    at_high = (positions >> (LOW_BITS + MIDDLE_BITS)) + HIGH
    cos, sin = jnp.split(jnp.asarray(low)[which, at_low], 2, axis=-1)
    for table, at in ((middle, at_middle), (high, at_high)):
        c, s = jnp.split(jnp.asarray(table)[which, at], 2, axis=-1)
        cos, sin = cos * c - sin * s, sin * c + cos * s
    return cos, sin
