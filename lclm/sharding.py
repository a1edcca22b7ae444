"""Where arrays live on a mesh, and the few collectives that single-device code needs.

A parameter's path names its logical axes ("heads", "embed"); `RULES` maps them to mesh
axes. A training step runs its loss and gradients inside one `jax.shard_map` over all
axes. There `gather`, `total`, `largest`, `axis_size` and `axis_index` know the mesh;
outside they are the identity, 1 and 0, so blocks have no branches.

One rule gives every gradient: the loss of a step is the sum of the losses of all
devices, each collective is differentiated as the linear map it is, and the gradient of
a parameter is summed over the axes that do not split it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lclm.errors import LclmError, unknown
from lclm.typing import Leaf

AXES = ("data", "fsdp", "tensor", "context_ring", "context_ulysses", "expert")
RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
}
# A query head must find its kv head on its own device: the two split alike or not.
ALIKE = {"kv_heads": "heads"}
# Weights are [out, in]; adapters are split with the side of theirs that is split.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(embed/table|head/weight)$", ("vocab", "embed")),
    (r"attn/q/(weight|bias)$", ("heads", "embed")),
    (r"attn/[kv]/(weight|bias)$", ("kv_heads", "embed")),
    (r"attn/o/weight$", ("embed", "heads")),
    (r"mlp/(gate|up)/(weight|bias)$", ("ffn", "embed")),
    (r"mlp/down/weight$", ("embed", "ffn")),
    (r"mlp/experts/(gate|up)$", ("expert", None, "embed")),
    (r"mlp/experts/down$", ("expert", "embed", None)),
    (r"attn/q/weight/lora_up$", ("heads", None)),
    (r"attn/[kv]/weight/lora_up$", ("kv_heads", None)),
    (r"attn/o/weight/lora_down$", (None, "heads")),
    (r"mlp/(gate|up)/weight/lora_up$", ("ffn", None)),
    (r"mlp/down/weight/lora_down$", (None, "ffn")),
)
# On every device: vectors, what is small, what an objective owns.
WHOLE = r"(scale|bias|sink|lora_down|lora_up)$|^objective/"
STACKED = r"^run_\d+/"  # one leading axis more, over the repeats of a scanned group
ROWS = ("data", "fsdp")
SEQUENCE = ("context_ring", "context_ulysses")
TOKENS = (*ROWS, *SEQUENCE)  # axes that split the tokens of a batch
COPIES = ("tensor", "expert")  # axes whose devices see the same tokens
BATCH = P(ROWS, SEQUENCE)

Logical = Sequence[str | None]


def make_mesh(
    devices: Sequence[jax.Device] | None = None,
    *,
    kind: AxisType = AxisType.Explicit,
    **sizes: int,
) -> Mesh:
    """A mesh of all six axes; those not named have size 1, one may be -1 (the rest).

    `make_mesh(fsdp=-1, tensor=2)` on 8 devices is fsdp 4, tensor 2. With explicit axes
    shapes carry their sharding; training takes automatic ones.
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
    return jax.make_mesh(shape, AXES, (kind,) * len(AXES), devices=devices)


def param_sharding(path: str, shape: Sequence[int], *, mesh: Mesh) -> NamedSharding:
    """Where a parameter that is only read lives.

    One of a form the table does not know (packed blocks) is on every device.
    """
    spec = _known(path, shape, mesh)
    return NamedSharding(mesh, P() if spec is None else spec)


def place(params: Any, mesh: Mesh) -> Any:
    """A parameter tree moved onto a mesh."""

    def put(path, leaf):
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        return jax.device_put(leaf, param_sharding(name, leaf.shape, mesh=mesh))

    return jax.tree_util.tree_map_with_path(put, params)


def param_spec(path: str, shape: Sequence[int], mesh: Any) -> P:
    """How training stores a parameter: as the table says, other matrices over fsdp.

    The axis of a scanned group's repeats is never split. A logical axis is split where
    the dimension divides; other matrices on their longest axis that does.
    """
    spec = _known(path, shape, mesh)
    first = 1 if re.match(STACKED, path) else 0
    if spec is not None or re.search(WHOLE, path) or len(shape) - first < 2:
        return spec or P()
    size = mesh.shape["fsdp"]
    fits = [i for i in range(first, len(shape)) if size > 1 and shape[i] % size == 0]
    if not fits:
        return P()
    longest = max(fits, key=lambda i: shape[i])
    return P(*("fsdp" if i == longest else None for i in range(len(shape))))


def _known(path: str, shape: Sequence[int], mesh: Any) -> P | None:
    """What the table says of a parameter; None where it says nothing."""
    for pattern, axes in PARAMETERS:
        if re.search(pattern, path):
            axes = axes[:1] if path.endswith("/bias") else axes
            lead = (None,) if re.match(STACKED, path) else ()
            axes = (*lead, *axes)
            return _spec(mesh, axes, shape) if len(axes) == len(shape) else None
    return None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Split:
    """This device's part of a parameter, in the place of the whole in a tree.

    dims: (axis counted from the last, mesh axes that split it), those to be gathered.
    Counted so, they stay true when a scan takes the leading axis away.
    """

    part: Leaf
    dims: tuple[tuple[int, tuple[str, ...]], ...] = field(metadata={"static": True})

    def whole(self) -> jax.Array:
        """The parameter put together; the gradient is summed and split again."""
        x = self.part
        for axis, names in self.dims:
            x = lax.all_gather(x, names, axis=x.ndim + axis, tiled=True)
        return x


def as_split(flat: Mapping[str, Any], specs: Mapping[str, P]) -> dict[str, Any]:
    """Flat parameters with `Split` for those that code is to `gather`.

    What blocks read as it is split (heads, hidden units, experts) stays an array.
    """
    out = {}
    for path, leaf in flat.items():
        spec, dims = specs[path], []
        whole = re.search(r"(^|/)(embed/table|head/weight)$", path)
        for i, names in enumerate(spec):
            names = (names,) if isinstance(names, str) else tuple(names or ())
            names = tuple(n for n in names if whole or n not in COPIES)
            if names:
                dims.append((i - leaf.ndim, names))
        out[path] = Split(leaf, tuple(dims)) if dims else leaf
    return out


def gather(tree: Any) -> Any:
    """A tree with every `Split` leaf put together."""
    return jax.tree.map(
        lambda leaf: leaf.whole() if isinstance(leaf, Split) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Split),
    )


def inside() -> bool:
    """Whether the code being traced is one device's part of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and AxisType.Manual in mesh.axis_types


def axis_size(*names: str) -> int:
    """Devices along mesh axes, multiplied; 1 outside a mesh."""
    if not inside():
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[n] for n in names if n in mesh.shape)


def _wide(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(n for n in names if axis_size(n) > 1)


def axis_index(*names: str) -> Any:
    """This device's place along mesh axes, the last one fastest; 0 outside a mesh."""
    names = _wide(names)
    return lax.axis_index(names) if names else 0


def total(tree: Any, *names: str) -> Any:
    """Sums over mesh axes."""
    names = _wide(names)
    return lax.psum(tree, names) if names else tree


def largest(x: Any, *names: str) -> Any:
    """Maximum over mesh axes, without a gradient."""
    names = _wide(names)
    return lax.pmax(lax.stop_gradient(x), names) if names else x


def unsplit(spec: P) -> tuple[str, ...]:
    """The mesh axes over which an array of this layout is a copy."""
    used = {
        n for part in spec for n in ((part,) if isinstance(part, str) else part or ())
    }
    return tuple(name for name in AXES if name not in used)


def _spec(mesh: Any, axes: Logical, shape: Sequence[int]) -> P:
    """A layout that splits each logical axis where all its dimensions divide."""
    sizes: dict[str, list[int]] = {}
    for name, size in zip(axes, shape, strict=True):
        if name is not None:
            sizes.setdefault(ALIKE.get(name, name), []).append(size)
    split = _assign(mesh, sizes)
    parts = [split.get(ALIKE.get(a, a), ()) if a is not None else () for a in axes]
    return P(*(part or None for part in parts))


def _assign(mesh: Any, sizes: dict[str, list[int]]) -> dict[str, tuple[str, ...]]:
    """Mesh axes of each logical axis: the longest prefix that divides every size."""
    found = {}
    for name, dims in sizes.items():
        axes = [m for m in RULES[name] if mesh.shape[m] > 1]
        while any(d % math.prod(mesh.shape[m] for m in axes) for d in dims):
            axes.pop()
        found[name] = tuple(axes)
    return found
