"""Kernels of Mamba-1's selective scan; the form in plain XLA is `lclm.ops.scan`."""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from pallas_kernels import dispatch, tuning

# By name: the module, and how its kernel is interpreted on a CPU (None: not at all).
KERNELS = {
    "mosaic_tpu": ("tpu", False),
    "mosaic_gpu": ("gpu", False),
    "interpret": ("tpu", True),
    "interpret_gpu": ("gpu", True),
}
NAMES = ("xla", *KERNELS)
BEST = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}  # by platform; XLA elsewhere
_log = logging.getLogger(__name__)


def kernel(
    x_shape: tuple[int, ...], states: int, dtype: Any, implementation: str | None
) -> Callable | None:
    """The kernel for a scan over `x` [B, T, C], or None where XLA's form is meant.

    None picks by platform and shape. A kernel asked for by name takes the call or
    raises ValueError with what it takes; "interpret" and "interpret_gpu" are the TPU's
    and the GPU's on any platform, step by step, for tests.
    """
    if implementation not in (None, *NAMES):
        raise ValueError(
            f"implementation={implementation!r} of the selective scan: known are "
            f"{NAMES}, or None for the best here"
        )
    name = implementation or BEST.get(dispatch.platform(), "xla")
    if implementation is None and dispatch.preferred() == "xla":
        name = "xla"
    if name == "xla":
        return None
    module, interpreted = KERNELS[name]
    try:
        found = importlib.import_module(f"pallas_kernels.selective_scan.{module}")
    except ImportError as error:
        reason = f"this JAX has no {name} ({error})"
    else:
        reason = found.supports(x_shape, states, dtype)
    if reason is None:
        sizes = tuning.of(f"scan_{module}")
        return functools.partial(found.scan, interpreted, sizes)
    if implementation is not None:
        raise ValueError(
            f"implementation={implementation!r} cannot run this scan: {reason}; "
            "change the sizes, or pass None"
        )
    _log.debug("the selective scan runs in XLA: %s", reason)
    return None
