"""A run compiled for devices that are not here: what it would take and how long."""

import os
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lclm.config import ModelConfig
from lclm.errors import LclmError, unknown
from lclm.models.decoder import param_shapes as _shapes
from lclm.train.collectives import collectives
from lclm.train.config import TrainConfig
from lclm.train.metrics import step_flops
from lclm.train.state import start
from lclm.train.step import make_step
from lclm.tree import nest


@dataclass(frozen=True)
class Chip:
    """One device: memory in bytes, bfloat16 peak in FLOP/s, bytes/s of memory and link.

    `link` is what one device sends to its neighbours in all directions together.
    """

    platform: str
    memory: int
    flops: float
    bandwidth: float
    link: float


# Vendors' data sheets.
CHIPS = {
    "v5e": Chip("tpu", 16 * 2**30, 197e12, 819e9, 200e9),
    "v5p": Chip("tpu", 95 * 2**30, 459e12, 2765e9, 600e9),
    "v6e": Chip("tpu", 32 * 2**30, 918e12, 1640e9, 448e9),
}


@dataclass(frozen=True)
class Ahead:
    """One step of a run on `devices` of a chip; bytes and FLOPs of one device.

    `held` are arguments (state, batch), `temporary` what the step needs beside them,
    `traffic` the bytes of both, read once and written once.
    """

    chip: Chip
    devices: int
    held: int
    temporary: int
    flops: float
    traffic: float
    collectives: dict[str, tuple[int, int]]

    @property
    def fits(self) -> bool:
        """Whether state and temporaries fit the memory of one device."""
        return self.held + self.temporary <= self.chip.memory

    def seconds(self) -> dict[str, float]:
        """The least time of each resource; a step takes at least the longest."""
        sent = sum(size for _, size in self.collectives.values())
        return {
            "arithmetic": self.flops / self.chip.flops,
            "memory": self.traffic / self.chip.bandwidth,
            "links": sent / self.chip.link,
        }


def topology(text: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of `v5e:16x16` (kind and shape of a slice).

    Raises LclmError for a kind or shape that is not known, or where the compiler for
    it is not installed.
    """
    name = text.partition(":")[0]
    if name not in CHIPS:
        raise unknown("kind of accelerator", name, CHIPS)
    for key, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=text)
    except Exception as error:  # the plugin raises what it likes
        missing = "libtpu" in str(error) or "not found" in str(error)
        remedy = (
            "the TPU compiler is not installed: `pip install libtpu` into this "
            "environment (no TPU is needed)"
            if missing
            else "give the shape of a slice, for instance v5e:4x4 or v5p:4x4x4"
        )
        raise LclmError(f"topology {text!r}: {remedy} ({error})") from error
    return CHIPS[name], list(found.devices)


def compile_step(
    run: TrainConfig, config: ModelConfig, chip: Chip, devices: list[Any]
) -> Ahead:
    """Compile the whole train step of a run for these devices; nothing is allocated.

    Raises LclmError as a run would before its first step, and where the mesh does not
    take all devices.
    """
    step = make_step(run, config, devices)
    layout, trained = step.layout, step.trunk.config
    if layout is None:
        raise LclmError("the run has no mesh: set mesh=dict(fsdp=-1), for instance")
    flat = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in _shapes(config).items()}
    state, frozen = jax.eval_shape(
        lambda tree: start(run, trained, tree, step.objective, step.tx), nest(flat)
    )
    where = layout.shardings(state)
    program = (
        jax.jit(step.__call__, donate_argnums=0, out_shardings=(where, None))
        .lower(
            _laid(state, where),
            _laid(frozen, layout.shardings(frozen)),
            layout.batch_shapes(run.batch, run.length),
        )
        .compile()
    )
    memory = program.memory_analysis()
    flops = step_flops(trained, run.batch, run.length) / len(devices)
    return Ahead(
        chip,
        len(devices),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        flops,
        2.0 * (memory.argument_size_in_bytes + memory.temp_size_in_bytes),
        collectives(program.as_text()),
    )


def _laid(shapes: Any, where: Any) -> Any:
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
        shapes,
        where,
    )
