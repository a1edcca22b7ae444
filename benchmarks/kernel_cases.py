"""What `benchmarks.kernels` measures: operations at their sizes, and who does them."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lclm.ops.scan import selective_scan
from pallas_kernels import dispatch
from pallas_kernels import mask as masks
from pallas_kernels.attention import attention
from pallas_kernels.decode import cached_attention, paged_attention
from pallas_kernels.decode.pages import Selection, page_bounds

# The kernel of a platform; it is named, since dispatch tries XLA's form first.
KERNELS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
PAGE = 16
Rivals = dict[str, Callable]


@dataclass(frozen=True)
class Case:
    """One operation at one size: what it costs, and who does it (name -> function).

    work: bytes moved, products ("flops") and exponentials ("exps"). peer: what the
    PyTorch process is asked, if it has the operation. chained: the first argument of a
    short operation has the shape of its result, and many calls are timed as one.
    """

    name: str
    args: Callable[[], tuple]
    rivals: Rivals
    work: dict[str, float] = field(default_factory=dict)
    peer: dict[str, Any] | None = None
    chained: bool = False

    def floor(self, rates: dict[str, float] | None) -> tuple[float, str] | None:
        """Seconds that no implementation goes below, and which resource says so."""
        if not rates:
            return None
        return max((amount / rates[unit], unit) for unit, amount in self.work.items())


def draw(*shapes: tuple[int, ...], dtype: Any = jnp.float32) -> tuple:
    """Normal arrays of the shapes."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )


def with_gradients(run: Callable, count: int) -> Callable:
    """The forward and the backward pass of `run` with respect to `count` arguments."""

    def loss(*args):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in run(*args))

    return jax.grad(loss, tuple(range(count)))


def by_name(run: Callable) -> Rivals:
    """`run` by this platform's kernel, if it has one, and by XLA's form."""
    named = KERNELS.get(dispatch.platform())
    found = {} if named is None else {"kernel": named}
    return {
        title: functools.partial(run, implementation=name)
        for title, name in (found | {"xla": "xla"}).items()
    }


def scans(small: bool) -> Iterator[Case]:
    """Mamba-1's selective scan in float32, of a layer's sizes and to a million."""
    sizes = [(2, 32768, 8192), (1, 32768, 8192)]
    sizes += [(1, length, 2048) for length in (8192, 131072, 1 << 20)]
    for B, T, C in [(1, 256, 1024)] if small else sizes:
        N = 16
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))

        def run(x, raw, a, b, c, positions=positions, implementation=None):
            return selective_scan(
                x, raw, a=-jnp.exp(a), b=b, c=c, positions=positions,
                implementation=implementation,
            )  # fmt: skip

        rivals = by_name(run)
        args = functools.partial(
            draw, (B, T, C), (B, T, C), (N, C), (B, T, N), (B, T, N)
        )
        size = f"{B} x {T:,} x {C:,}"
        work = {"bytes": 12.0 * B * T * C, "exps": 1.0 * B * T * C * N}
        peer = dict(case="scan", B=B, T=T, C=C, N=N, gradients=False)
        yield Case(f"scan forward {size}", args, rivals, work, peer)
        if T <= 32768:
            both = {k: with_gradients(f, 5) for k, f in rivals.items()}
            work = {"bytes": 40.0 * B * T * C, "exps": 3.0 * B * T * C * N}
            peer = peer | {"gradients": True}
            yield Case(f"scan with gradients {size}", args, both, work, peer)


def cudnn_window(q, k, v, *, window: int) -> tuple:
    """Window attention of cuDNN, as JAX calls it."""
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="cudnn",
        local_window_size=(window - 1, 0),
    )  # fmt: skip
    return (out,)


def splash_window(q, k, v, *, window: int) -> tuple:
    """Window attention of JAX's splash kernel (TPU)."""
    from jax.experimental.pallas.ops.tpu import splash_attention as package

    T = q.shape[1]
    seen = package.LocalMask((T, T), (window - 1, 0), 0)
    sizes = {"block_q": 512, "block_kv": 512, "block_q_dq": 512, "block_kv_dq": 512}
    run = package.make_splash_mha(
        package.MultiHeadMask([seen] * q.shape[2]), head_shards=1, q_seq_shards=1,
        block_sizes=package.BlockSizes(**sizes, block_q_dkv=512, block_kv_dkv=512),
    )  # fmt: skip
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[3] ** -0.5, k, v))
    return (jax.vmap(run)(q, k, v).swapaxes(1, 2),)


def dense_rivals(run: Callable, window: int | None) -> Rivals:
    """Others' kernels of this platform for causal attention, within a window or not."""
    names = {"gpu": "cudnn", "tpu": "splash"}
    name = names.get(dispatch.platform())
    if name is None:
        return {}
    if window is not None:
        found = {"cudnn": cudnn_window, "splash": splash_window}
        return {name: functools.partial(found[name], window=window)}
    there = [name, *["tokamax"] * bool(importlib.util.find_spec("tokamax"))]
    # Their gradients are those of the output alone.
    return {
        name: lambda *args, name=name: run(*args, implementation=name)[:1]
        for name in there
    }


def attentions(small: bool) -> Iterator[Case]:
    """Causal, window, sinks, block-sparse; bfloat16, 32 query and 8 kv heads."""
    lengths = [512] if small else [8192, 32768, 131072]
    N, K, H = (2, 1, 64) if small else (32, 8, 128)
    for T in lengths:
        causal = masks.causal()
        kinds = {"dense": (causal, {})}
        for w in (128,) if small else (512, 1024, 4096):
            near = causal & (masks.sink(4) | masks.window(w))
            told = {"window": w}
            kinds[f"window {w}"] = masks.window(w), told
            kinds[f"sinks 4 window {w}"] = near, told | {"sinks": 4}
        stripes = causal & masks.block_sparse(128, local=4, stride=8)
        told = {"block": 128, "local": 4, "stride": 8}
        kinds["blocks of 128, local 4, stride 8"] = stripes, told
        for kind, (mask, told) in kinds.items():
            args = functools.partial(
                draw, (1, T, N, H), (1, T, K, H), (1, T, K, H), dtype=jnp.bfloat16
            )

            def run(q, k, v, mask=mask, implementation=None):
                return attention(q, k, v, mask=mask, implementation=implementation)

            rivals = by_name(run)
            if not {"sinks", "block"} & {*told}:
                rivals |= dense_rivals(run, told.get("window"))
            work = {
                "flops": float(mask.flops(T, T, heads=N, head_dim=H)),
                "bytes": 2.0 * T * H * 2 * (N + K),
            }
            peer = dict(case="attention", T=T, N=N, K=K, H=H, gradients=False, **told)
            yield Case(f"{kind} forward {T:,}", args, rivals, work, peer)
            if T <= 32768:
                both = {k: with_gradients(f, 3) for k, f in rivals.items()}
                work = {"flops": 3.5 * work["flops"], "bytes": 3.0 * work["bytes"]}
                peer = peer | {"gradients": True}
                yield Case(f"{kind} with gradients {T:,}", args, both, work, peer)


def cudnn_one(q, k, v) -> tuple:
    """One query over all keys [B, K, C, H] by cuDNN."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return (out,)


def decodes(small: bool) -> Iterator[Case]:
    """One token over a cache, whole and by Quest's pages (1,024 and 2,048 tokens)."""
    N, K, H = (2, 1, 64) if small else (32, 8, 128)
    for C in [1024] if small else [32768, 131072, 524288]:
        q_pos = jnp.full((1, 1), C - 1, jnp.int32)
        shapes = (1, 1, N, H), (1, K, C, H), (1, K, C, H)
        args = functools.partial(draw, *shapes, dtype=jnp.bfloat16)
        places = jnp.arange(C, dtype=jnp.int32)[None, None]

        def whole(q, k, v, implementation, q_pos=q_pos, places=places):
            return cached_attention(
                q, k, v, q_pos, places, implementation=implementation
            )

        rivals = by_name(whole)
        if dispatch.platform() == "gpu":
            rivals["cudnn"] = cudnn_one
        size = 2.0 * K * H * 2
        told = dict(case="decode", C=C, N=N, K=K, H=H)
        yield Case(
            f"decode {C:,}", args, rivals, {"bytes": size * C}, told, chained=True
        )

        def with_bounds(args=args, C=C):
            q, k, v = args()
            return q, k, v, page_bounds(k, jnp.full(1, C, jnp.int32), PAGE)

        for budget in (256,) if small else (1024, 2048):
            choice = Selection(PAGE, budget // PAGE)

            def paged(q, k, v, bounds, implementation, q_pos=q_pos, choice=choice):
                return paged_attention(
                    q, k, v, bounds, q_pos, choice, implementation=implementation
                )

            read = size * (budget + C / PAGE)
            yield Case(
                f"quest {budget:,} of {C:,}", with_bounds, by_name(paged),
                {"bytes": read}, chained=True,
            )  # fmt: skip


GROUPS = {"scan": scans, "attention": attentions, "decode": decodes}
