"""Kernels of this device beside their floors and beside what others ship.

    python -m benchmarks.kernels                      (a GPU or TPU: about 10 minutes)
    python -m benchmarks.kernels --only scan          (cases whose name has the word)
    python -m benchmarks.kernels --small              (a CPU: seconds, to try it)

Every case is one operation by several implementations, timed in turn on the same
arrays: ours as dispatch picks it, ours in plain XLA, cuDNN where it has the operation.
`floor` is the longest of bytes over copy bandwidth, products over the matrix rate and
exponentials over their rate (what an H200 reaches, not its data sheet); "-" on other
devices. Writes benchmarks/results/kernels-DEVICE.json, each case as it is finished.
"""

import argparse
import datetime
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lclm.ops.scan import selective_scan
from pallas_kernels import mask as masks
from pallas_kernels.attention import attention

HERE = Path(__file__).parent
# Reached on one H200: bytes/s of a copy, bfloat16 FLOP/s, exponentials/s.
H200 = {"bytes": 4.3e12, "flops": 7.8e14, "exps": 4.0e12}


@dataclass(frozen=True)
class Case:
    """One operation at one size: what it costs, and who does it (name -> function)."""

    name: str
    args: Callable[[], tuple]
    rivals: dict[str, Callable]
    work: dict[str, float] = field(default_factory=dict)

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

        rivals = {"ours": run, "xla": functools.partial(run, implementation="xla")}
        args = functools.partial(
            draw, (B, T, C), (B, T, C), (N, C), (B, T, N), (B, T, N)
        )
        size = f"{B} x {T:,} x {C:,}"
        work = {"bytes": 12.0 * B * T * C, "exps": 1.0 * B * T * C * N}
        yield Case(f"scan forward {size}", args, rivals, work)
        if T <= 32768:
            both = {k: with_gradients(f, 5) for k, f in rivals.items()}
            work = {"bytes": 40.0 * B * T * C, "exps": 3.0 * B * T * C * N}
            yield Case(f"scan with gradients {size}", args, both, work)


def cudnn(q, k, v, *, window: int | None = None) -> tuple:
    """Dense causal or window attention of cuDNN, as JAX calls it."""
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    return (out,)


def attentions(small: bool) -> Iterator[Case]:
    """Causal, window, sinks, block-sparse; bfloat16, 32 query and 8 kv heads."""
    lengths = [512] if small else [8192, 32768, 131072]
    N, K, H = (2, 1, 64) if small else (32, 8, 128)
    for T in lengths:
        kinds = {"dense": (masks.causal(), {"cudnn": cudnn})}
        for w in (128,) if small else (512, 1024, 4096):
            near = functools.partial(cudnn, window=w)
            kinds[f"window {w}"] = masks.window(w), {"cudnn": near}
            kinds[f"sinks 4 window {w}"] = (
                masks.causal() & (masks.sink(4) | masks.window(w)),
                {},
            )
        stripes = masks.causal() & masks.block_sparse(128, local=4, stride=8)
        kinds["blocks of 128, local 4, stride 8"] = stripes, {}
        for kind, (mask, rivals) in kinds.items():
            args = functools.partial(
                draw, (1, T, N, H), (1, T, K, H), (1, T, K, H), dtype=jnp.bfloat16
            )

            def run(q, k, v, mask=mask):
                return attention(q, k, v, mask=mask)

            if jax.default_backend() != "gpu":
                rivals = {}
            rivals = {"ours": run} | rivals
            work = {
                "flops": float(mask.flops(T, T, heads=N, head_dim=H)),
                "bytes": 2.0 * T * H * 2 * (N + K),
            }
            yield Case(f"{kind} forward {T:,}", args, rivals, work)
            if T <= 32768:
                both = {k: with_gradients(f, 3) for k, f in rivals.items()}
                work = {"flops": 3.5 * work["flops"], "bytes": 3.0 * work["bytes"]}
                yield Case(f"{kind} with gradients {T:,}", args, both, work)


GROUPS = {"scan": scans, "attention": attentions}


def timed(run: Callable, args: tuple) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - began


def measure(case: Case, rounds: int, rates: dict[str, float] | None) -> dict[str, Any]:
    """Every rival in turn, `rounds` times; one that fails says why."""
    args, row, running = case.args(), {}, {}
    for name, function in case.rivals.items():
        try:
            compiled = jax.jit(function).lower(*args).compile()
            timed(compiled, args)
        except Exception as error:  # the reason becomes the rival's result
            row[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            continue
        running[name] = compiled
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, compiled in running.items():
            times[name].append(timed(compiled, args))
    floor = case.floor(rates)
    for name, found in times.items():
        row[name] = {"min_ms": 1e3 * min(found)}
        row[name]["median_ms"] = 1e3 * statistics.median(found)
        if floor:
            row[name]["over_floor"] = min(found) / floor[0]
    known = {"floor_ms": 1e3 * floor[0], "bound_by": floor[1]} if floor else {}
    return {"case": case.name, **known, "results": row}


def main() -> None:
    """Measure what is asked for, print a line a case, keep the JSON."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--only", action="append", help="a word of the case's name")
    flags.add_argument("--small", action="store_true", help="sizes of a CPU")
    flags.add_argument("--rounds", type=int, default=10)
    flags.add_argument("--out", type=Path)
    args = flags.parse_args()
    device = jax.devices()[0]
    kind = device.device_kind
    rates = H200 if "H200" in kind else None
    name = kind.replace(" ", "-").lower()
    out = args.out or HERE / "results" / f"kernels-{name}.json"
    record = {
        "device": kind,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "command": " ".join(["python -m benchmarks.kernels", *sys.argv[1:]]),
        "small": args.small,
        "cases": [],
    }
    for group, cases in GROUPS.items():
        for case in cases(args.small):
            if args.only and not any(w in f"{group} {case.name}" for w in args.only):
                continue
            row = measure(case, args.rounds, rates)
            record["cases"].append(row)
            print(case.name, json.dumps(row["results"]), flush=True)
            out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
