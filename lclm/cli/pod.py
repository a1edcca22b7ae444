"""`lclm plan --config=FILE --topology=v5e:16x16`: a train step compiled in advance."""

import os
import time

from rich.console import Console
from rich.table import Table

from lclm.cli.config_file import read_config
from lclm.errors import LclmError


def plan_run(config: str, topology: str, console: Console | None = None) -> None:
    """Compile the train step of a config for a slice that is not here, and print it.

    Raises:
      LclmError: the config, the topology or the mesh is at fault, or one device's
        memory does not hold the step.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from lclm import hub
    from lclm.models.presets import PRESETS, preset
    from lclm.serve.memory import format_bytes
    from lclm.train import ahead
    from lclm.train.config import train_config

    console = console or Console()
    run = train_config(read_config(config))
    source = run.model.source
    model = preset(source) if source in PRESETS else hub.describe(source)
    chip, devices = ahead.topology(topology)
    began = time.perf_counter()
    with console.status(f"compiling for {len(devices)} devices"):
        found = ahead.compile_step(run, model, chip, devices)
    title = (
        f"{run.name}: {run.batch:,} x {run.length:,} tokens a step on {topology} "
        f"({len(devices)} devices), compiled in {time.perf_counter() - began:.0f} s"
    )
    table = Table("a device", "", title=title, title_justify="left")
    table.add_row("state and batch", format_bytes(found.held))
    table.add_row("temporaries", format_bytes(found.temporary))
    table.add_row("memory", format_bytes(int(chip.memory)))
    table.add_row("FLOPs a step", f"{found.flops:.3e}")
    for kind, (times, size) in found.collectives.items():
        table.add_row(f"{kind} x {times:,}", format_bytes(size))
    for name, seconds in found.seconds().items():
        table.add_row(f"least time, {name}", f"{seconds * 1e3:,.1f} ms")
    console.print(table)
    least = max(found.seconds().values())
    rate = run.batch * run.length / least
    console.print(
        f"roofline: {least * 1e3:,.1f} ms a step at least, {rate:,.0f} tokens/s, "
        f"{found.flops / chip.flops / least:.0%} of peak at most"
    )
    if not found.fits:
        raise LclmError(
            f"one device needs {format_bytes(found.held + found.temporary)} and has "
            f"{format_bytes(int(chip.memory))}: split over more devices (mesh), set "
            "remat=dict(kind='full'), or take fewer or shorter rows"
        )
