"""Kernels of this device beside their floors and beside what others ship.

    python -m benchmarks.kernels                      (a GPU or TPU: about 10 minutes)
    python -m benchmarks.kernels --only scan          (cases whose name has the word)
    python -m benchmarks.kernels --small              (a CPU: a minute, to try it)
    python -m benchmarks.kernels --torch PYTHON       (another Python than this one)

Every case is one operation by several implementations, timed in turn on arrays of the
same sizes: our kernel by name, our plain XLA form, cuDNN, splash and tokamax where the
platform and the package are there, and in a process of its own PyTorch's SDPA and
FlexAttention and mamba_ssm's CUDA scan. `floor` is the longest of bytes over copy
bandwidth, products over the matrix rate and exponentials over their rate (what an H200
reaches, not its data sheet); there is none on other devices. Writes
benchmarks/results/kernels-DEVICE.json, each case as it is finished, and at the end a
table and a figure beside it.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a peer is beside us

import jax
from jax import lax

from benchmarks import kernels_report
from benchmarks.compare import Worker
from benchmarks.kernel_cases import GROUPS, Case

HERE = Path(__file__).parent
# Reached on one H200: bytes/s of a copy, bfloat16 FLOP/s, exponentials/s.
H200 = {"bytes": 4.3e12, "flops": 7.8e14, "exps": 4.0e12}
QUEUED = 10  # calls that an accelerator is handed at once
CHAINED = 32  # calls of a short operation that are timed as one
PACKAGES = ("jax", "jaxlib", "tokamax", "torch", "triton", "mamba_ssm")


def chained(run: Callable, times: int) -> Callable:
    """`run` so often, each call behind the one before, for operations of microseconds.

    What is added to the query is far below its rounding.
    """

    def body(_, state):
        q, *rest = state
        return (q + (1e-30 * run(q, *rest)[0]).astype(q.dtype), *rest)

    return lambda *args: lax.fori_loop(0, times, body, args)[0]


def timed(run: Callable, args: tuple) -> float:
    """Seconds of one call, of a run of calls where they are queued (as the peer's)."""
    times = 1 if jax.default_backend() == "cpu" else QUEUED
    began = time.perf_counter()
    for _ in range(times):
        out = run(*args)  # the one before is given back
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / times


def compiled(case: Case, args: tuple, row: dict[str, Any]) -> dict[str, Callable]:
    """What takes the seconds of a call, by rival; one that fails says why in `row`."""
    running = {}
    for name, function in case.rivals.items():
        times = CHAINED if case.chained else 1
        wanted = chained(function, times) if case.chained else function
        try:
            program = jax.jit(wanted).lower(*args).compile()
            timed(program, args)
        except Exception as error:  # the reason becomes the rival's result
            row[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            continue
        running[name] = functools.partial(
            lambda program, times: timed(program, args) / times, program, times
        )
    return running


def measure(
    case: Case, rounds: int, rates: dict[str, float] | None, peer: Worker | None
) -> dict[str, Any]:
    """Every rival in turn, `rounds` times."""
    args, row = case.args(), {}
    running = compiled(case, args, row)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, take in running.items():
            times[name].append(take())
        for name, found in asked(peer, case).items():
            if "error" in found:
                row[name] = found
            else:
                times.setdefault(name, []).append(found["seconds"])
    floor = case.floor(rates)
    for name, found in times.items():
        row[name] = {"min_ms": 1e3 * min(found)}
        row[name]["median_ms"] = 1e3 * statistics.median(found)
        if floor:
            row[name]["over_floor"] = min(found) / floor[0]
    known = {"floor_ms": 1e3 * floor[0], "bound_by": floor[1]} if floor else {}
    return {"case": case.name, **known, "results": row}


def asked(peer: Worker | None, case: Case) -> dict[str, dict[str, Any]]:
    """The peer's implementations of a case: their seconds, or why there are none."""
    if peer is None or case.peer is None:
        return {}
    answer = peer.ask(case.peer)
    if "error" in answer:
        return {"torch": answer}
    return {k: found for k, found in answer.items() if isinstance(found, dict)}


@contextlib.contextmanager
def torch_peer(python: str, threads: int) -> Iterator[Worker | None]:
    """PyTorch's process, or None where that Python has no PyTorch."""
    if python == sys.executable and importlib.util.find_spec("torch") is None:
        yield None
        return
    line = [python, str(HERE / "peers" / "torch_kernels_peer.py")]
    worker = Worker("torch", line, {"threads": threads})
    try:
        yield None if "error" in worker.ready else worker
    finally:
        worker.close()


def facts(small: bool) -> dict[str, Any]:
    """Where and when: device, its clocks, versions, date, command."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": jax.devices()[0].device_kind,
        "clocks": clocks(),
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "command": " ".join(["python -m benchmarks.kernels", *sys.argv[1:]]),
        "small": small,
    }


def clocks() -> str | None:
    """Clocks of the processor and memory of an NVIDIA GPU and its driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    fields = "clocks.sm,clocks.max.sm,clocks.mem,driver_version"
    line = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(line, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure what is asked for, print a line a case, keep the JSON."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--only", action="append", help="a word of the case's name")
    flags.add_argument("--small", action="store_true", help="sizes of a CPU")
    flags.add_argument("--rounds", type=int, default=10)
    flags.add_argument("--torch", default=sys.executable, help="a Python with PyTorch")
    flags.add_argument("--out", type=Path)
    args = flags.parse_args()
    record = facts(args.small) | {"cases": []}
    rates = H200 if "H200" in record["device"] else None
    name = record["device"].replace(" ", "-").lower()
    out = args.out or HERE / "results" / f"kernels-{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with torch_peer(args.torch, len(os.sched_getaffinity(0))) as peer:
        for group, cases in GROUPS.items():
            for case in cases(args.small):
                words = args.only or [""]
                if not any(word in f"{group} {case.name}" for word in words):
                    continue
                row = measure(case, args.rounds, rates, peer)
                record["cases"].append(row)
                print(case.name, json.dumps(row["results"]), flush=True)
                out.write_text(json.dumps(record, indent=1) + "\n")
    kernels_report.write(out)


if __name__ == "__main__":
    main()
