"""Several processes as one machine, through `jax.distributed`."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lclm.errors import LclmError

AUTO = "auto"
NAMES = ("LCLM_COORDINATOR", "LCLM_PROCESSES", "LCLM_PROCESS")


def join(environ: Mapping[str, str] = os.environ) -> int:
    """Join the processes that the environment names; their number, 1 for this alone.

    LCLM_COORDINATOR is host:port of process 0, LCLM_PROCESSES their number,
    LCLM_PROCESS this one's, from 0. LCLM_COORDINATOR=auto alone leaves all three to
    what `jax.distributed` finds out by itself: on Cloud TPU, under Slurm, Open MPI or
    Kubernetes. To be called before any device is used; CPU devices exchange through
    gloo. Raises LclmError where the three do not fit together.
    """
    if environ.get(NAMES[0]) == AUTO:
        jax.distributed.initialize()
        return jax.process_count()
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
        number, index = int(given[NAMES[1]]), int(given[NAMES[2]])
    except ValueError:
        number, index = 0, 0
    if not 0 <= index < number:
        raise LclmError(
            f"LCLM_PROCESSES={given[NAMES[1]]}, LCLM_PROCESS={given[NAMES[2]]}: give "
            "the number of processes, and which of them this is, from 0"
        )
    if number == 1:
        return 1
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(given[NAMES[0]], number, index)
    return number


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def first() -> bool:
    """Whether this process is the one that writes and talks."""
    return jax.process_index() == 0


def meet(place: str) -> None:
    """Wait until every process is at this place."""
    if count() > 1:
        multihost_utils.sync_global_devices(place)


def told(number: int) -> int:
    """What process 0 says."""
    if count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def largest(number: int) -> int:
    """The largest of what the processes say."""
    if count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def on_host(tree: Any) -> Any:
    """A tree whose arrays this process can read; every process must call it.

    Arrays that are spread over processes are gathered, one after the other, into the
    memory of each host.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(one, tree)
