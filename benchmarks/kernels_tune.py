"""The best sizes of each kernel on this chip, written to its table.

    python -m benchmarks.kernels_tune                  (a GPU or TPU: some minutes)
    python -m benchmarks.kernels_tune --only decode    (kernels whose name has the word)

One size after the other takes the value that is fastest with the others as they are, a
case of `benchmarks.kernels` a kernel, minima of interleaved calls. What differs from
`default.json` by more than 2% in time is written to pallas_kernels/tuning/CHIP.json.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.kernel_cases import GROUPS, KERNELS, Case
from benchmarks.kernels import compiled
from pallas_kernels import dispatch, tuning

Sizes = dict[str, Any]
# By kernel: the case that is timed, and what each size may be.
CHOICES: dict[str, tuple[str, dict[str, tuple]]] = {
    "attention_gpu": (
        "sinks 4 window 4096 with gradients 32,768",
        {"stages": (2, 3, 4), "back_stages": (2, 3)},
    ),
    "attention_tpu": (
        "sinks 4 window 4096 with gradients 32,768",
        {
            "at_once": (1, 2, 4, 8),
            "at_once_back": (1, 2, 4),
            "tile": (1 << 17, 1 << 18, 1 << 19),
            "step": (1 << 15, 1 << 16, 1 << 17),
        },
    ),
    "decode_gpu": (
        "decode 131,072",
        {"stages": (2, 3, 4), "programs": (132, 264, 528), "least": (2, 4, 8)},
    ),
    "decode_tpu": (
        "decode 131,072",
        {"block": (1024, 2048, 4096), "scores": (8 << 10, 16 << 10, 32 << 10)},
    ),
    "scan_gpu": (
        "scan with gradients 1 x 32,768 x 8,192",
        {"block": (16, 32), "unrolled": (2, 4, 8)},
    ),
    "scan_tpu": (
        "scan with gradients 1 x 32,768 x 8,192",
        {
            "forward": (64, 128, 256),
            "backward": (32, 64, 128),
            "unrolled": (4, 8, 16),
            "unrolled_back": (4, 8, 16),
        },
    ),
}
WORTH = 0.98  # of the defaults' time: a size that gains less is left as it is


def descend(
    choices: dict[str, tuple], start: Sizes, seconds: Callable[[Sizes], float]
) -> tuple[Sizes, float]:
    """The best sizes found by changing one at a time, and their seconds.

    `seconds` is infinite for sizes that do not run. A change must gain 2%.
    """
    best, least = dict(start), seconds(start)
    for name, values in choices.items():
        for value in values:
            tried = best | {name: value}
            if tried != best and (found := seconds(tried)) < WORTH * least:
                best, least = tried, found
    return best, least


def case(name: str) -> Case:
    """The case of that name."""
    for cases in GROUPS.values():
        for found in cases(False):
            if found.name == name:
                return found
    raise ValueError(f"no case {name!r}: see benchmarks/kernel_cases.py")


def seconds(kernel: str, asked: Case, rounds: int, sizes: Sizes) -> float:
    """The least time of a call with these sizes; infinite where it does not run."""
    row: dict[str, Any] = {}
    with tuning.using(kernel, **sizes):
        running = compiled(asked, asked.args(), row)
    if "kernel" not in running:
        print(f"{kernel} {sizes}: {row['kernel']['error']}", flush=True)
        return float("inf")
    found = min(running["kernel"]() for _ in range(rounds))
    print(f"{kernel} {sizes}: {1e3 * found:.3f} ms", flush=True)
    return found


def main() -> None:
    """Tune this chip's kernels and write what is better than the defaults."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--only", action="append", help="a word of a kernel's name")
    flags.add_argument("--rounds", type=int, default=10)
    args = flags.parse_args()
    chip, which = tuning.chip(), dispatch.platform()
    if chip is None or which not in KERNELS:
        sys.exit(f"no table for this {which}: known are {sorted(tuning.KINDS)}")
    path = tuning.HERE / f"{chip}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    for kernel, (name, choices) in CHOICES.items():
        words = args.only or [""]
        if not kernel.endswith(which) or not any(word in kernel for word in words):
            continue
        asked = case(name)
        only = {k: run for k, run in asked.rivals.items() if k == "kernel"}
        asked = Case(asked.name, asked.args, only, chained=asked.chained)
        start = tuning.table(None)[kernel]
        timed = functools.partial(seconds, kernel, asked, args.rounds)
        best, _ = descend(choices, start, timed)
        changed = {k: v for k, v in best.items() if v != start[k]}
        table.pop(kernel, None)
        table |= {kernel: changed} if changed else {}
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        print(f"{chip} {kernel}: {changed or 'the defaults'}", flush=True)


if __name__ == "__main__":
    main()
