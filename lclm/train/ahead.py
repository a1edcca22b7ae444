"""A run compiled for devices that are not here: what it would take and how long."""

import os
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lclm.config import ModelConfig
from lclm.errors import LclmError, unknown
from lclm.models.decoder import param_shapes as _shapes
from lclm.train.collectives import collectives
from lclm.train.config import TrainConfig
from lclm.train.layout import BATCH
from lclm.train.metrics import mean_step
from lclm.train.state import start
from lclm.train.step import Step, make_step
from lclm.tree import nest
from pallas_kernels import dispatch


@dataclass(frozen=True)
class Chip:
    """One device: memory in bytes, bfloat16 peak in FLOP/s, bytes/s of memory and link.

    `link` is what one device sends to its neighbours in all directions together.
    """

    name: str
    platform: str
    memory: int
    flops: float
    bandwidth: float
    link: float


# Vendors' data sheets. NVLink: 900e9 in and out together, so half of it out.
CHIPS = {
    "v5e": Chip("v5e", "tpu", 16 * 2**30, 197e12, 819e9, 200e9),
    "v5p": Chip("v5p", "tpu", 95 * 2**30, 459e12, 2765e9, 600e9),
    "v6e": Chip("v6e", "tpu", 32 * 2**30, 918e12, 1640e9, 448e9),
    "h200": Chip("h200", "cuda", 150_754_820_096, 989e12, 4.8e12, 450e9),
}
NODE = 8  # H200 that one NVLink switch joins
SHAPES = {
    "tpu": "give the shape of a slice, for instance v5e:4x4, v5p:2x2x4, or v5e:1",
    "cuda": f"give h200 for one, h200:8 for a node (at most {NODE}), h200:2x8 for two",
}
SMALLER = (
    "Split it over more devices (mesh), set remat=dict(kind='attention'), or take "
    "fewer or shorter rows"
)
# What compiles for a platform that is not here; no device is needed.
COMPILERS = {"tpu": "jax[tpu]", "cuda": "jax[cuda13]"}


@dataclass(frozen=True)
class Ahead:
    """One step of a run on `devices` of a chip; bytes and FLOPs of one device.

    `held` are arguments (state, batch), `temporary` what the step needs beside them,
    `traffic` the bytes of both, read once and written once, `host` those offloaded to
    the host's memory.
    """

    chip: Chip
    devices: int
    held: int
    temporary: int
    flops: float
    traffic: float
    collectives: dict[str, tuple[int, int]]
    host: int = 0

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

    `h200:8` is a node of 8, `h200:2x8` two of them. The kind alone, and a shape of 1,
    is one device. Raises LclmError for a kind or shape that is not known, or where the
    compiler for it is not installed.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise unknown("kind of accelerator", name, CHIPS)
    chip = CHIPS[name]
    options = _nodes(text, shape) if chip.platform == "cuda" else _slice(name, shape)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform=chip.platform, **options)
    except Exception as error:  # the plugins raise what they like
        missing = any(s in str(error) for s in ("not installed", "not implemented"))
        remedy = (
            f"the compiler for {name} is not installed: `pip install "
            f'"{COMPILERS[chip.platform]}=={jax.__version__}"` (no device is needed)'
            if missing
            else SHAPES[chip.platform]
        )
        raise LclmError(f"topology {text!r}: {remedy} ({error})") from error
    devices = list(found.devices)
    return chip, devices[:1] if shape in ("", "1") else devices


def _nodes(text: str, shape: str) -> dict[str, str]:
    """Nodes x devices of each, as XLA's GPU compiler is told."""
    sizes = [int(n) if n.isdecimal() else 0 for n in (shape or "1").split("x")]
    if len(sizes) > 2 or min(sizes) < 1 or sizes[-1] > NODE:
        raise LclmError(f"topology {text!r}: {SHAPES['cuda']}")
    described = resources.files("lclm.train").joinpath("h200.txtpb").read_text()
    whole = "x".join(map(str, [1] * (3 - len(sizes)) + sizes))
    return {"target_config": described, "topology": whole}


def _slice(name: str, shape: str) -> dict[str, str]:
    """A TPU slice; one device is the first of the smallest slice."""
    for key, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(key, value)
    smallest = "2x2x1" if name == "v5p" else "2x2"
    return {"topology_name": f"{name}:{smallest if shape in ('', '1') else shape}"}


def compile_step(
    run: TrainConfig, config: ModelConfig, chip: Chip, devices: list[Any]
) -> Ahead:
    """Compile the whole train step of a run for these devices; nothing is allocated.

    Raises LclmError as a run would before its first step, where the mesh does not take
    all devices, and where the compiler finds no way into one device's memory.
    """
    if run.mesh is None and len(devices) > 1:
        raise LclmError(
            f"{len(devices)} devices and a run without mesh: say how they share it, "
            "mesh=dict(fsdp=-1) for instance"
        )
    with dispatch.target(chip.platform, chip.name):
        step = make_step(run, config, devices)
        lowered = trace_step(step, config, devices[0]).lower()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise LclmError(
            f"the step does not fit the memory of one device: {_first_line(error)}. "
            f"{SMALLER}"
        ) from error
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes
    made = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    temporary = memory.temp_size_in_bytes + made
    _, flops = mean_step(step.trunk.config, run)
    return Ahead(
        chip,
        len(devices),
        held,
        temporary,
        flops / len(devices),
        2.0 * (held + temporary),
        collectives(program.as_text()),
        memory.host_temp_size_in_bytes,
    )


def trace_step(step: Step, config: ModelConfig, device: Any) -> jax.stages.Traced:
    """The step traced for the devices of its mesh, or for `device` where it has none.

    `config` is the model before the run changes it.
    """
    run, layout = step.run, step.layout
    flat = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in _shapes(config).items()}
    trained = step.trunk.config
    state, frozen = jax.eval_shape(
        lambda tree: start(run, trained, tree, step.objective, step.tx), nest(flat)
    )
    if layout is None:
        alone = SingleDeviceSharding(device)
        where, rest = (jax.tree.map(lambda _: alone, x) for x in (state, frozen))
        shape = run.batch, run.length
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=alone)
            for name, dtype in BATCH.items()
        }
    else:
        where, rest = layout.shardings(state), layout.shardings(frozen)
        batch = layout.batch_shapes(run.batch, run.length)
    return jax.jit(step.__call__, donate_argnums=0, out_shardings=(where, None)).trace(
        _laid(state, where), _laid(frozen, rest), batch
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". HLO module")[0]


def _laid(shapes: Any, where: Any) -> Any:
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
        shapes,
        where,
    )
