"""Which implementation of attention runs, and on what platform.

`supports` fails closed: an implementation that does not know it can do a call
refuses it. With `implementation=None` the first that accepts runs; one asked for by
name that refuses is an error with the reason. `LCLM_KERNELS=xla` in the environment, or
`with preferring("xla")`, has None mean XLA's forms.
"""

import dataclasses
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.spec import Spec

_LOG = logging.getLogger("pallas_kernels")


@dataclasses.dataclass(frozen=True)
class Call:
    """The facts of a call that decide who can run it."""

    spec: Spec
    q_shape: tuple[int, ...]
    kv_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    dtype: jnp.dtype
    kv_dtype: jnp.dtype
    platform: str
    sink: bool = False
    segments: bool = False


@dataclasses.dataclass(frozen=True)
class Decode:
    """The same of attention over the buffers `k` and `v` of a cache.

    sums: column sums are asked for; page, count: of pages that are listed, if any.
    """

    q_shape: tuple[int, ...]
    k: Any
    v: Any
    platform: str
    sums: bool = False
    page: int | None = None
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Where it is (`module:name`) and why it would refuse a call.

    `backward` is where its gradients are, for one whose parts can be joined; `pages` is
    where it reads listed pages, and `best` where it chooses them, for one that attends
    to caches. `library`: it is of others; `named`: it runs only where it is asked for.
    """

    target: str
    supports: Callable[[Any], str | None]
    backward: str | None = None
    library: bool = False
    named: bool = False
    pages: str | None = None
    best: str = "pallas_kernels.decode.pages:_best"

    def load(self) -> Callable:
        """The function itself."""
        return _load(self.target)

    def load_backward(self) -> Callable:
        """Its gradients from what it keeps: `backward(spec, saved, cotangents)`."""
        if self.backward is None:
            raise ValueError(f"{self.target} has no backward of its own; pass None")
        return _load(self.backward)

    def load_pages(self) -> Callable:
        """Its attention over listed pages of a cache."""
        if self.pages is None:
            raise ValueError(f"{self.target} reads no listed pages; pass None")
        return _load(self.pages)

    def load_best(self) -> Callable:
        """Its choice of the largest of many scores."""
        return _load(self.best)


def _load(target: str) -> Callable:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def outside_shard_map() -> str | None:
    """Why a mesh hinders a kernel here, or None: kernels are one device's code."""
    mesh = jax.sharding.get_abstract_mesh()
    shared = set(mesh.axis_names) - set(mesh.manual_axes)
    if any(mesh.shape[name] > 1 for name in shared):
        return f"mesh axes {sorted(shared)} share its arrays outside shard_map"
    return None


def not_hopper() -> str | None:
    """Why the GPU that is here runs no Hopper kernel; None also where none is here."""
    if jax.default_backend() == "gpu":
        found = getattr(jax.devices()[0], "compute_capability", "0")
        if not found.startswith("9"):
            return f"compute capability {found} is not 9.x"
    return None


def _floating(call: Call) -> str | None:
    known = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
    if call.dtype in [jnp.dtype(d) for d in known]:
        return None
    return f"dtype {call.dtype} is not float64, float32, bfloat16 or float16"


def _small(call: Call) -> str | None:
    (B, T, N, _), S = call.q_shape, call.kv_shape[1]
    if B * N * T * S > 1 << 30:
        return f"its {B * N * T * S} dense scores exceed 2**30; use 'xla'"
    return _floating(call)


def _mosaic_tpu(call: Call) -> str | None:
    if call.platform != "tpu":
        return f"it runs on tpu, and this is {call.platform}"
    from pallas_kernels.attention import tpu

    return tpu.refuses(call)


def _mosaic_gpu(call: Call) -> str | None:
    if call.platform != "gpu":
        return f"it runs on gpu, and this is {call.platform}"
    try:
        from pallas_kernels.attention import gpu
    except ImportError as error:
        return f"this JAX has no Mosaic GPU ({error})"
    return gpu.refuses(call)


def _library(name: str, platform: str | None) -> Callable[[Call], str | None]:
    """Why a library's kernel, of one platform or of any, would refuse a call."""

    def supports(call: Call) -> str | None:
        if platform not in (None, call.platform):
            return f"it runs on {platform}, and this is {call.platform}"
        return _load(f"pallas_kernels.attention.library:refuses_{name}")(call)

    return supports


def _decode_tpu(call: Decode) -> str | None:
    if call.platform != "tpu":
        return f"it runs on tpu, and this is {call.platform}"
    from pallas_kernels.decode import tpu

    return tpu.refuses(call)


def _decode_gpu(call: Decode) -> str | None:
    if call.platform != "gpu":
        return f"it runs on gpu, and this is {call.platform}"
    try:
        from pallas_kernels.decode import gpu
    except ImportError as error:
        return f"this JAX has no Mosaic GPU ({error})"
    return gpu.refuses(call)


# In the order in which they are tried.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "cudnn": Implementation(
        "pallas_kernels.attention.library:cudnn",
        _library("cudnn", "gpu"),
        "pallas_kernels.attention.library:backward",
        library=True,
    ),
    "mosaic_tpu": Implementation(
        "pallas_kernels.attention.tpu:attend",
        _mosaic_tpu,
        "pallas_kernels.attention.tpu:backward",
    ),
    "mosaic_gpu": Implementation(
        "pallas_kernels.attention.gpu:attend",
        _mosaic_gpu,
        "pallas_kernels.attention.gpu:backward",
    ),
    "xla": Implementation(
        "pallas_kernels.attention.vjp:attend",
        _floating,
        "pallas_kernels.attention.vjp:backward",
    ),
    "reference": Implementation("pallas_kernels.attention.reference:attend", _small),
    "splash": Implementation(
        "pallas_kernels.attention.library:splash",
        _library("splash", "tpu"),
        "pallas_kernels.attention.library:backward",
        library=True,
        named=True,
    ),
    "tokamax": Implementation(
        "pallas_kernels.attention.library:tokamax",
        _library("tokamax", None),
        "pallas_kernels.attention.library:backward",
        library=True,
        named=True,
    ),
}


# Attention over caches, in the same order and by the same rule.
DECODE: dict[str, Implementation] = {
    "mosaic_tpu": Implementation(
        "pallas_kernels.decode.tpu:attend",
        _decode_tpu,
        pages="pallas_kernels.decode.tpu:attend_pages",
        best="pallas_kernels.decode.select_tpu:best",
    ),
    "mosaic_gpu": Implementation(
        "pallas_kernels.decode.gpu:attend",
        _decode_gpu,
        pages="pallas_kernels.decode.gpu:attend_pages",
    ),
    "xla": Implementation(
        "pallas_kernels.decode.cached:attend",
        lambda call: None,
        pages="pallas_kernels.decode.pages:attend_pages",
    ),
}


def select(
    call: Call | Decode, implementation: str | None, *, own: bool = False
) -> Implementation:
    """What runs `call`; ValueError if none, or not the named one, can run.

    `own`: where none is named, no library's kernel is taken.
    """
    known = DECODE if isinstance(call, Decode) else IMPLEMENTATIONS
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"implementation={implementation!r}: this build has "
            f"{sorted(known)}; name one of them or pass None"
        )
    names = [implementation]
    if implementation is None:
        first = preferred()
        names = sorted(known, key=lambda name: name != first)
        names = [n for n in names if n == first or not known[n].named]
        names = [n for n in names if not (own and known[n].library)]
    reasons = []
    for name in names:
        reason = known[name].supports(call)
        if reason is None:
            return known[name]
        _LOG.debug("attention on %s: %s refuses: %s", call.platform, name, reason)
        reasons.append(f"{name}: {reason}")
    raise ValueError(
        f"implementation={implementation!r} cannot run this attention "
        f"({'; '.join(reasons)}); change the arguments or pass None"
    )


# The platform that programs are lowered for, the chip where its name was told, and who
# is tried first: part of the key of JAX's trace caches.
_TARGET = jax.make_user_context(None)
_CHIP = jax.make_user_context(None)
_FIRST = jax.make_user_context(os.environ.get("LCLM_KERNELS"))
PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu"}


def platform() -> str:
    """The platform that a call traced now will run on: cpu, gpu or tpu."""
    return _TARGET.value or jax.default_backend()


def chip() -> str | None:
    """The chip that `target` was told, such as "v5e"."""
    return _CHIP.value


@contextmanager
def target(name: str, chip: str | None = None) -> Iterator[None]:
    """Calls traced inside run on a platform, or a `chip` of it, that may not be here.

    What a form is chosen by (`platform`) answers it, and JAX's caches take nothing that
    was traced for another. Raises ValueError for a platform that is not known.
    """
    if name not in PLATFORMS:
        raise ValueError(f"platform {name!r}: known are {sorted(PLATFORMS)}")
    with _TARGET(PLATFORMS[name]), _CHIP(chip):
        yield


def preferred() -> str | None:
    """Who is tried first where no implementation is named, if anybody is.

    Raises ValueError for a name that this build does not have.
    """
    name = _FIRST.value
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"LCLM_KERNELS or preferring {name!r}: this build has "
            f"{sorted(IMPLEMENTATIONS)}"
        )
    return name


@contextmanager
def preferring(name: str) -> Iterator[None]:
    """Calls traced inside that name no implementation try this one first."""
    with _FIRST(name):
        yield
