"""Several processes as one machine, through `jax.distributed`."""

import os
from collections.abc import Mapping

import jax

from lclm.errors import LclmError

NAMES = ("LCLM_COORDINATOR", "LCLM_PROCESSES", "LCLM_PROCESS")


def join(environ: Mapping[str, str] = os.environ) -> int:
    """Join the processes that the environment names; their number, 1 for this alone.

    LCLM_COORDINATOR is host:port of process 0, LCLM_PROCESSES their number,
    LCLM_PROCESS this one's, from 0. To be called before any device is used; CPU
    devices exchange through gloo. Raises LclmError where the three do not fit together.
    """
    given = {name: environ[name] for name in NAMES if name in environ}
    if not given:
        return 1
    missing = [name for name in NAMES if name not in given]
    if missing:
        raise LclmError(
            f"{', '.join(given)} without {', '.join(missing)}: set all three, or none "
            "for one process"
        )
    try:
        count, index = int(given[NAMES[1]]), int(given[NAMES[2]])
    except ValueError:
        count, index = 0, 0
    if not 0 <= index < count:
        raise LclmError(
            f"LCLM_PROCESSES={given[NAMES[1]]}, LCLM_PROCESS={given[NAMES[2]]}: give "
            "the number of processes, and which of them this is, from 0"
        )
    if count == 1:
        return 1
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(given[NAMES[0]], count, index)
    return count
