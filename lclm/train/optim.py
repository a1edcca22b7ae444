"""Optimizers and schedules from a run's settings, over flat parameters by path."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lclm.train.config import Group, Optimizer
from lclm.typing import Params


def make_schedule(spec: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by optimizer step, for a run of `steps`."""
    rest = max(steps - spec.warmup, 1)
    low = spec.lr * spec.floor
    match spec.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(spec.lr, rest, spec.floor)
        case "linear":
            after = optax.linear_schedule(spec.lr, low, rest)
        case "trapezoid":
            return _trapezoid(spec, steps, min(spec.decay or rest, rest))
        case _:
            after = optax.constant_schedule(spec.lr)
    if not spec.warmup:
        return after
    rise = optax.linear_schedule(spec.lr / spec.warmup, spec.lr, spec.warmup - 1)
    return optax.join_schedules([rise, after], [spec.warmup])


def _trapezoid(spec: Optimizer, steps: int, fall: int) -> optax.Schedule:
    """Up, flat and down, nowhere below the floor (DuoAttention's, arXiv 2410.10819)."""

    def rate(step: Any) -> Any:
        up = (step + 1) / max(spec.warmup, 1)
        down = (steps - step) / fall
        share = jnp.minimum(jnp.maximum(jnp.minimum(up, down), spec.floor), 1.0)
        return spec.lr * share

    return rate


def make_optimizer(spec: Optimizer, steps: int) -> optax.GradientTransformation:
    """The chain clip -> Adam -> decay -> rate; trees are flat, keyed by path.

    The count of the schedule is in the state, so a skipped step does not advance it.
    """
    parts = []
    if spec.clip_value is not None:
        parts.append(optax.clip(spec.clip_value))
    if spec.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(spec.clip_norm))
    parts.append(optax.scale_by_adam(spec.b1, spec.b2, spec.eps))
    parts.append(_decay(spec))
    parts.append(_rates(spec))
    schedule = make_schedule(spec, steps)
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)


def _group(spec: Optimizer, path: str) -> Group | None:
    return next((g for g in spec.groups if re.search(g.match, path)), None)


def _decay(spec: Optimizer) -> optax.GradientTransformation:
    """Add decay * parameter; none for vectors' paths in `no_decay`."""

    def rate(path: str) -> float:
        group = _group(spec, path)
        if group is not None and group.weight_decay is not None:
            return group.weight_decay
        free = any(re.search(pattern, path) for pattern in spec.no_decay)
        return 0.0 if free else spec.weight_decay

    def update(updates: Params, state: Any, params: Params | None = None):
        if params is None:
            raise ValueError("weight decay needs the parameters beside the updates")
        out = {
            path: u + rate(path) * params[path].astype(u.dtype) if rate(path) else u
            for path, u in updates.items()
        }
        return out, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _rates(spec: Optimizer) -> optax.GradientTransformation:
    """Scale the updates of each group."""

    def update(updates: Params, state: Any, params: Params | None = None):
        scales = {p: g.lr for p in updates if (g := _group(spec, p)) is not None}
        return {p: u * scales.get(p, 1.0) for p, u in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def global_norm(tree: Any) -> jax.Array:
    """Square root of the sum of all squares, in float32."""
    total = sum(
        jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)
    )
    return jnp.sqrt(total)
