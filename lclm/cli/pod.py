"""`lclm plan --config=FILE --topology=v5e:16x16`: a train step compiled in advance."""

import os
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lclm.cli.config_file import read_config, read_mesh
from lclm.errors import LclmError

if TYPE_CHECKING:
    from lclm.train.ahead import Ahead
    from lclm.train.config import TrainConfig

REST = "fsdp=-1"  # how many devices share a run that does not say it


def plan_run(
    config: str,
    topology: str,
    *,
    mesh: str | None = None,
    console: Console | None = None,
) -> None:
    """Compile the train step of a config for devices that are not here, and print it.

    `mesh` (`fsdp=4,context_ring=4`) stands in for that of the config, which several
    devices share as `fsdp=-1` where neither says it.

    Raises:
      LclmError: the config, the topology or the mesh is at fault, or one device's
        memory does not hold the step.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # What is compiled for a device that is not here cannot be read back from the cache.
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    from lclm import hub
    from lclm.models.presets import PRESETS, preset
    from lclm.serve.memory import format_bytes
    from lclm.train import ahead
    from lclm.train.config import replace, train_config

    console = console or Console()
    run = train_config(read_config(config))
    source = run.model.source
    model = preset(source) if source in PRESETS else hub.describe(source)
    chip, devices = ahead.topology(topology)
    if mesh is None and run.mesh is None and len(devices) > 1:
        mesh = REST
        console.print(f"the config has no mesh; planned as mesh=dict({REST})")
    if mesh is not None:
        run = replace(run, mesh=read_mesh(mesh))
    began = time.perf_counter()
    with console.status(f"compiling for {len(devices)} devices"):
        found = ahead.compile_step(run, model, chip, devices)
    seconds = time.perf_counter() - began
    console.print(_table(run, topology, found, seconds))
    least = max(found.seconds().values())
    lengths = run.data.lengths or (run.length,)
    rate = run.batch * sum(lengths) / len(lengths) / least
    console.print(
        f"roofline: {least * 1e3:,.1f} ms a step at least, {rate:,.0f} tokens/s, "
        f"{found.flops / chip.flops / least:.0%} of peak at most"
    )
    if not found.fits:
        raise LclmError(
            f"one device needs {format_bytes(found.held + found.temporary)} and has "
            f"{format_bytes(chip.memory)}. {ahead.SMALLER}"
        )


def _table(run: "TrainConfig", topology: str, found: "Ahead", seconds: float) -> Table:
    from lclm.serve.memory import format_bytes

    title = (
        f"{run.name}: {run.batch:,} x {run.length:,} tokens a step on {topology} "
        f"({found.devices} devices), compiled in {seconds:.0f} s"
    )
    table = Table("a device", "", title=title, title_justify="left")
    table.add_row("state and batch", format_bytes(found.held))
    table.add_row("temporaries", format_bytes(found.temporary))
    table.add_row("memory", format_bytes(found.chip.memory))
    if found.host:
        table.add_row("offloaded to the host", format_bytes(found.host))
    table.add_row("FLOPs a step", f"{found.flops:.3e}")
    for kind, (times, size) in found.collectives.items():
        table.add_row(f"{kind} x {times:,}", format_bytes(size))
    for name, least in found.seconds().items():
        table.add_row(f"least time, {name}", f"{least * 1e3:,.1f} ms")
    return table
