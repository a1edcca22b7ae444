"""Sizes that kernels run with, by chip.

`default.json` has every size of every kernel; a chip's table, such as `v5e.json`, has
those that its compiler or a run on it found better. docs/kernels.md says what each is.
"""

import collections
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels import dispatch

HERE = Path(__file__).parent
# What JAX calls a chip, and the name of its table.
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H200": "h200",
}
_USED = jax.make_user_context(())


def of(kernel: str) -> NamedTuple:
    """The sizes of a kernel on the chip that a call traced now will run on.

    A backward pass must have those of its forward pass: where what is kept depends on
    one, hand it on.
    """
    changes = {name: size for own, name, size in _USED.value if own == kernel}
    sizes = table(chip())[kernel] | changes
    return _sizes(kernel, tuple(sizes))(**sizes)


@functools.cache
def _sizes(kernel: str, names: tuple[str, ...]) -> type:
    return collections.namedtuple(kernel, names)


def chip() -> str | None:
    """The name of the table of the chip that a call traced now will run on, if any."""
    return dispatch.chip() or KINDS.get(_kind())


def _kind() -> str:
    here = dispatch.platform() == jax.default_backend()
    return jax.devices()[0].device_kind if here else ""


@functools.cache
def table(chip: str | None) -> dict[str, dict[str, Any]]:
    """Every kernel's sizes on a chip; the defaults on one without a table."""
    defaults = json.loads((HERE / "default.json").read_text())
    path = HERE / f"{chip}.json"
    own = json.loads(path.read_text()) if chip and path.exists() else {}
    return {kernel: sizes | own.get(kernel, {}) for kernel, sizes in defaults.items()}


@contextmanager
def using(kernel: str, **sizes: Any) -> Iterator[None]:
    """Calls traced inside run with these sizes of a kernel.

    Raises ValueError for a kernel or a size that `default.json` does not have.
    """
    known = table(None).get(kernel, {})
    if not sizes.keys() <= known.keys():
        raise ValueError(
            f"sizes {sorted(sizes)} of kernel {kernel!r}: it has {sorted(known)}; "
            f"kernels are {sorted(table(None))}"
        )
    changes = tuple((kernel, name, size) for name, size in sorted(sizes.items()))
    with _USED((*_USED.value, *changes)):
        yield
