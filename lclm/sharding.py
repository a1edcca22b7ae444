"""Where arrays live on a mesh: the only file that knows one. Identity without a mesh.

Code names logical axes ("batch", "heads"); `RULES` maps them to mesh axes. Enter a mesh
once with `jax.set_mesh(make_mesh(...))`. Its axes are explicit, so shapes carry their
sharding and a wrong one is an error at trace time.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lclm.errors import LclmError, unknown

AXES = ("data", "fsdp", "tensor", "context_ring", "context_ulysses", "expert")
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "seq": ("context_ring", "context_ulysses"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "state": (),
}
# A query head must find its kv head on its own device: the two split alike or not.
ALIKE = {"kv_heads": "heads"}
# Weights are [out, in].
PARAMETERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(embed/table|head/weight)$", ("vocab", "embed")),
    (r"attn/q/(weight|bias)$", ("heads", "embed")),
    (r"attn/[kv]/(weight|bias)$", ("kv_heads", "embed")),
    (r"attn/o/weight$", ("embed", "heads")),
    (r"attn/sink$", ("heads",)),
    (r"mlp/(gate|up)/(weight|bias)$", ("ffn", "embed")),
    (r"mlp/down/weight$", ("embed", "ffn")),
    (r"(scale|bias)$", ()),
)

Logical = Sequence[str | None]


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh of all six axes; those not named have size 1, one may be -1 (the rest).

    `make_mesh(fsdp=-1, tensor=2)` on 8 devices is fsdp 4, tensor 2.
    """
    devices = jax.devices() if devices is None else list(devices)
    for name, size in sizes.items():
        if name not in AXES:
            raise unknown("mesh axis", name, AXES)
        if size < 1 and size != -1:
            raise LclmError(f"mesh axis {name}={size}: give at least 1, or -1 for rest")
    fixed = math.prod(s for s in sizes.values() if s > 0)
    free = [name for name, size in sizes.items() if size == -1]
    fits = len(devices) % fixed == 0 if free else len(devices) == fixed
    if len(free) > 1 or not fits:
        raise LclmError(
            f"mesh {sizes} does not fit {len(devices)} devices: the sizes multiply to "
            "the number of devices, and at most one of them is -1"
        )
    sizes |= {name: len(devices) // fixed for name in free}
    shape = [sizes.get(name, 1) for name in AXES]
    return jax.make_mesh(shape, AXES, (AxisType.Explicit,) * len(AXES), devices=devices)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by logical axes, one per dimension (None: not split)."""
    mesh = _mesh()
    if mesh is None:
        return x
    return jax.reshard(x, NamedSharding(mesh, _spec(mesh, axes, x.shape)))


def param_sharding(
    path: str, shape: Sequence[int], *, mesh: Mesh | None = None
) -> NamedSharding | None:
    """Where a parameter lives; None without a mesh.

    A parameter of a form the table does not know (packed blocks) is on every device.
    """
    mesh = mesh or _mesh()
    if mesh is None:
        return None
    for pattern, axes in PARAMETERS:
        if re.search(pattern, path):
            axes = axes[: len(shape)] if path.endswith("/bias") else axes
            fits = len(axes) == len(shape)
            return NamedSharding(mesh, _spec(mesh, axes, shape) if fits else P())
    return NamedSharding(mesh, P())


def place(params: Any, mesh: Mesh) -> Any:
    """A parameter tree moved onto a mesh."""

    def put(path, leaf):
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        return jax.device_put(leaf, param_sharding(name, leaf.shape, mesh=mesh))

    return jax.tree_util.tree_map_with_path(put, params)


def local(fn: Callable, in_axes: Sequence[Logical], out_axes: Any) -> Callable:
    """`fn` as single-device code under `jax.shard_map`; `fn` itself without a mesh.

    in_axes: logical axes of each argument; every array of a pytree argument has them.
    out_axes: those of the result, or a tuple of them for a tuple of results. A logical
    axis is split only where all its dimensions divide, in arguments and results alike.
    """

    @functools.wraps(fn)
    def call(*args):
        mesh = _mesh()
        if mesh is None:
            return fn(*args)
        if len(args) != len(in_axes):
            raise TypeError(f"{len(args)} arguments, axes for {len(in_axes)}")
        sizes: dict[str, list[int]] = {}
        for axes, arg in zip(in_axes, args, strict=True):
            for leaf in jax.tree.leaves(arg):
                _measure(sizes, axes, leaf.shape)
        split = _assign(mesh, sizes)
        in_specs = tuple(_partition(axes, split) for axes in in_axes)
        nested = bool(out_axes) and not isinstance(out_axes[0], str | None)
        out_specs = (
            tuple(_partition(axes, split) for axes in out_axes)
            if nested
            else _partition(out_axes, split)
        )
        laid = [
            jax.tree.map(lambda x, s=s: jax.reshard(x, NamedSharding(mesh, s)), arg)
            for arg, s in zip(args, in_specs, strict=True)
        ]
        mapped = jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs)
        return mapped(*laid)

    return call


def _mesh() -> Any:
    """The mesh in use; None without one, and inside `local` (one device)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def _spec(mesh: Any, axes: Logical, shape: Sequence[int]) -> P:
    sizes: dict[str, list[int]] = {}
    _measure(sizes, axes, shape)
    return _partition(axes, _assign(mesh, sizes))


def _measure(sizes: dict[str, list[int]], axes: Logical, shape: Sequence[int]) -> None:
    """Collect the dimensions of each logical axis; refuse what cannot be meant."""
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for shape {tuple(shape)}")
    names = [a for a in axes if a is not None]
    for name in names:
        if name not in RULES:
            raise unknown("logical axis", name, RULES)
    used = [m for name in names for m in RULES[name]]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(names)} use one mesh axis twice: {used}")
    for name, size in zip(axes, shape, strict=True):
        if name is not None:
            sizes.setdefault(ALIKE.get(name, name), []).append(size)


def _assign(mesh: Any, sizes: dict[str, list[int]]) -> dict[str, tuple[str, ...]]:
    """Mesh axes of each logical axis: the longest prefix that divides every size."""
    found = {}
    for name, dims in sizes.items():
        axes = [m for m in RULES[name] if mesh.shape[m] > 1]
        while any(d % math.prod(mesh.shape[m] for m in axes) for d in dims):
            axes.pop()
        found[name] = tuple(axes)
    return found


def _partition(axes: Logical, split: dict[str, tuple[str, ...]]) -> P:
    parts = [split.get(ALIKE.get(a, a), ()) if a is not None else () for a in axes]
    return P(*(part or None for part in parts))
