"""Kernels of Mamba-1's selective scan; the form in plain XLA is `lclm.ops.scan`."""

import logging
from collections.abc import Callable
from typing import Any

from pallas_kernels import dispatch

NAMES = ("xla", "mosaic_tpu", "interpret")
_log = logging.getLogger(__name__)


def kernel(
    x_shape: tuple[int, ...], states: int, dtype: Any, implementation: str | None
) -> Callable | None:
    """The kernel for a scan over `x` [B, T, C], or None where XLA's form is meant.

    None picks by platform and shape. A kernel asked for by name takes the call or
    raises ValueError with what it takes; "interpret" is the TPU's kernel on any
    platform, step by step, for tests.
    """
    if implementation not in (None, *NAMES):
        raise ValueError(
            f"implementation={implementation!r} of the selective scan: known are "
            f"{NAMES}, or None for the best here"
        )
    asked = implementation in ("mosaic_tpu", "interpret")
    if not asked and (implementation == "xla" or dispatch.platform() != "tpu"):
        return None
    from pallas_kernels.selective_scan import tpu

    reason = tpu.supports(x_shape, states, dtype)
    if reason is None:
        return lambda *args: tpu.scan(implementation == "interpret", *args)
    if asked:
        raise ValueError(
            f"implementation={implementation!r} cannot run this scan: {reason}; "
            "change the sizes, or pass None"
        )
    _log.debug("the selective scan runs in XLA: %s", reason)
    return None
