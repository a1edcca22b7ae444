"""A run on a mesh: what is checked before it, and where its state and batches live."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lclm import sharding
from lclm.attention.context import ALONE, Context, make_context
from lclm.config import AttentionSpec, ModelConfig
from lclm.errors import LclmError
from lclm.ops.int8 import Int8Weight
from lclm.ops.packed import PackedWeight
from lclm.specs import Mamba2Spec, MambaSpec, MlpSpec, MoeSpec
from lclm.train.config import TrainConfig
from lclm.typing import Batch, Params

HANDED_ON = (MambaSpec, Mamba2Spec)  # mixers whose state goes from device to device
BATCH = dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32)
BATCH |= {"weights": jnp.float32}


@dataclass(frozen=True)
class Layout:
    """Devices and how a run is laid on them; hashable."""

    mesh: jax.sharding.Mesh
    context: Context

    def specs(self, params: Params) -> dict[str, P]:
        """The layout of each parameter, by path; packed ones are on every device."""
        return {
            path: sharding.param_spec(path, leaf.shape, self.mesh)
            if not _packed(leaf)
            else P()
            for path, leaf in params.items()
        }

    def shardings(self, tree: Any) -> Any:
        """Where each array of a tree over flat parameters lives, moments included."""

        def one(path: tuple, leaf: Any) -> NamedSharding:
            name, spec = str(getattr(path[-1], "key", "")), P()
            if "/" in name:
                spec = sharding.param_spec(name, leaf.shape, self.mesh)
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(one, tree)

    def place(self, tree: Any) -> Any:
        """A state or parameters, alike in all processes, on the devices of the mesh.

        Raises LclmError for packed matrices where heads or experts are split.
        """
        copies = math.prod(self.mesh.shape[name] for name in sharding.COPIES)
        for leaf in jax.tree.leaves(tree, is_leaf=_packed) if copies > 1 else ():
            if _packed(leaf):
                raise LclmError(
                    f"packed matrices on a mesh with tensor x expert = {copies}: they "
                    "are not split; set both to 1, or start from a dense checkpoint"
                )
        return jax.tree.map(_put, tree, self.shardings(tree))

    def place_batch(self, batch: Batch, rows: int) -> Batch:
        """A batch of `rows` rows on the devices; a process may bring all or its own."""
        where = NamedSharding(self.mesh, sharding.BATCH)

        def put(array: np.ndarray) -> jax.Array:
            if len(array) == rows:
                return _put(array, where)
            shape = (rows, *array.shape[1:])
            return jax.make_array_from_process_local_data(where, array, shape)

        return {name: put(np.asarray(array)) for name, array in batch.items()}

    def share(self, rows: int, length: int) -> tuple[int, int]:
        """Which part of a batch's rows this process must bring, of how many.

        (0, 1), all of them, where its devices do not hold one equal part alone.
        """
        where = NamedSharding(self.mesh, sharding.BATCH)
        held = where.addressable_devices_indices_map((rows, length)).values()
        spans = [index[0].indices(rows)[:2] for index in held]
        low, high = min(a for a, _ in spans), max(b for _, b in spans)
        columns = {index[1].indices(length)[:2] for index in held}
        count = jax.process_count()
        whole = sum(b - a for a, b in columns) == length
        if not whole or (high - low) * count != rows or low % (high - low):
            return 0, 1
        return low // (high - low), count

    def batch_shapes(self, rows: int, length: int) -> Batch:
        """Shapes of a batch where `place_batch` would put it."""
        where = NamedSharding(self.mesh, sharding.BATCH)
        return {
            name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=where)
            for name, dtype in BATCH.items()
        }

    def in_order(self, batch: Batch) -> Batch:
        """The batch with its tokens in the order devices hold them."""
        if self.context.order == "contiguous":
            return batch
        length = batch["tokens"].shape[1]
        at = self.context.places(length)
        return jax.tree.map(lambda x: jnp.take(x, at, axis=1), batch)


def _packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedWeight | Int8Weight)


def _put(leaf: Any, where: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(leaf, where)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def make_layout(
    run: TrainConfig, config: ModelConfig, devices: Any = None
) -> Layout | None:
    """The layout of a run; None where it has no mesh.

    Raises LclmError, before anything is compiled, where batch, length, heads or
    experts do not divide, or a layer cannot be spread as asked.
    """
    if run.mesh is None:
        if jax.process_count() > 1:
            raise LclmError(
                f"{jax.process_count()} processes and no mesh: say how the "
                f"{jax.device_count()} devices share the run, mesh=dict(fsdp=-1)"
            )
        return None
    sizes = dataclasses.asdict(run.mesh)
    strategy = sizes.pop("context")
    mesh = sharding.make_mesh(devices, kind=AxisType.Auto, **sizes)
    sizes = dict(mesh.shape)
    _check_rows(run, sizes)
    _check_layers(config, sizes)
    _check_objective(run, sizes)
    ring, ulysses = (sizes[name] for name in sharding.SEQUENCE)
    if ring * ulysses == 1:
        return Layout(mesh, ALONE)
    _check_context(config, sizes, run.length)
    mixers = [layer.mixer for layer in config.layers]
    seen = [m for m in mixers if isinstance(m, AttentionSpec)]
    context = make_context(
        ring,
        ulysses,
        length=run.length,
        windows=[None if m.static else m.window for m in seen],
        strategy=strategy,
        states=len(seen) < len(mixers),
    )
    return Layout(mesh, context)


def _check_rows(run: TrainConfig, sizes: dict[str, int]) -> None:
    shards = math.prod(sizes[name] for name in sharding.ROWS)
    if run.batch % (shards * run.accumulate):
        raise LclmError(
            f"batch {run.batch} does not split over data x fsdp = {shards} devices in "
            f"accumulate={run.accumulate} microbatches: make batch a multiple of "
            f"{shards * run.accumulate}"
        )


def _check_objective(run: TrainConfig, sizes: dict[str, int]) -> None:
    """Probes read the heads and the rows of an attention layer as a whole."""
    parts = math.prod(sizes[n] for n in ("tensor", *sharding.SEQUENCE))
    if parts > 1 and not str(run.objective).startswith("next_token"):
        raise LclmError(
            f"objective {run.objective!r} looks into attention layers, whose heads and "
            "rows cannot be shared then: set tensor, context_ring and context_ulysses "
            "to 1 and use data or fsdp"
        )


def _check_layers(config: ModelConfig, sizes: dict[str, int]) -> None:
    tensor, expert = sizes["tensor"], sizes["expert"]
    for i, layer in enumerate(config.layers):
        counts = {}
        if isinstance(layer.mixer, AttentionSpec):
            counts["query heads"] = layer.mixer.heads
            counts["kv heads"] = layer.mixer.kv_heads
        if isinstance(layer.mlp, MlpSpec):
            counts["hidden units"] = layer.mlp.width
        for name, count in counts.items():
            if count % tensor:
                raise LclmError(
                    f"tensor={tensor} does not divide the {count} {name} of layer "
                    f"{i}: take a divisor of {count}"
                )
        if isinstance(layer.mlp, MoeSpec) and layer.mlp.experts % expert:
            raise LclmError(
                f"expert={expert} does not divide the {layer.mlp.experts} experts of "
                f"layer {i}: take a divisor of {layer.mlp.experts}"
            )
    if expert > 1 and not any(isinstance(x.mlp, MoeSpec) for x in config.layers):
        raise LclmError(
            f"expert={expert} with a model without experts: leave expert at 1 and give "
            "its devices to data or fsdp"
        )


def _check_context(config: ModelConfig, sizes: dict[str, int], length: int) -> None:
    ring, ulysses = (sizes[name] for name in sharding.SEQUENCE)
    for i, layer in enumerate(config.layers):
        mixer, part = layer.mixer, length // (ring * ulysses)
        if isinstance(mixer, HANDED_ON):
            if part < mixer.conv - 1:
                raise LclmError(
                    f"rows of {length} tokens over context_ring={ring} and "
                    f"context_ulysses={ulysses}: the convolution of layer {i} reads "
                    f"{mixer.conv - 1} tokens back, over more than one device; take "
                    "longer rows or fewer devices"
                )
            continue
        if not isinstance(mixer, AttentionSpec):
            raise LclmError(
                f"context_ring={ring}, context_ulysses={ulysses}: layer {i} is "
                f"{mixer.TYPE!r}, whose state runs along the row and is not handed on, "
                "so rows cannot be shared: set both to 1 and use data, fsdp or tensor"
            )
        heads = layer.mixer.heads // sizes["tensor"]
        if heads % ulysses:
            raise LclmError(
                f"context_ulysses={ulysses} does not divide the {heads} query heads a "
                f"device has in layer {i}: take a divisor, and a larger context_ring"
            )
