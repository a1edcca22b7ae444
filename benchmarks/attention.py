"""Attention on this machine: dense and window forms of ours, and torch SDPA.

    python benchmarks/attention.py [--peer PYTHON] [--repeats 7] [--out FILE]

`PYTHON` is an interpreter that has torch. Both sides run in turn, one repetition at a
time, so that other load hits both; prints JSON with minima and medians in
milliseconds and our speed as a multiple of the peer's.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

# name: batch, tokens, query heads, kv heads, head width, type, window
CASES = {
    "causal-4k-9x3-float32": (1, 4096, 9, 3, 64, "float32", None),
    "causal-4k-9x3-bfloat16": (1, 4096, 9, 3, 64, "bfloat16", None),
    "causal-4k-8x8-float32": (1, 4096, 8, 8, 64, "float32", None),
    "causal-4k-8x8-bfloat16": (1, 4096, 8, 8, 64, "bfloat16", None),
}
LONG = {
    "causal-16k-9x3-float32": (1, 16384, 9, 3, 64, "float32", None),
    "window512-16k-9x3-float32": (1, 16384, 9, 3, 64, "float32", 512),
}

PEER = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
made = {}
for line in sys.stdin:
    B, T, N, K, H, dtype, _ = json.loads(line)
    key = (B, T, N, K, H, dtype)
    if key not in made:
        made[key] = [torch.randn(B, h, T, H, dtype=getattr(torch, dtype))
                     for h in (N, K, K)]
    q, k, v = made[key]
    start = time.perf_counter()
    torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=N != K)
    print(json.dumps(time.perf_counter() - start), flush=True)
"""


class Peer:
    """Torch in an interpreter of its own; one timed call per request."""

    def __init__(self, python: str):
        command = [python, "-c", PEER, str(os.cpu_count())]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **pipes)

    def __call__(self, case) -> float:
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Ours:
    """The compiled operation for one case."""

    def __init__(self, case):
        import jax

        from pallas_kernels import mask as masks
        from pallas_kernels.attention import attention

        B, T, N, K, H, dtype, window = case
        mask = masks.causal() if window is None else masks.window(window)
        keys = jax.random.split(jax.random.key(0), 3)
        self.args = [
            jax.random.normal(key, (B, T, h, H)).astype(dtype)
            for key, h in zip(keys, (N, K, K), strict=True)
        ]
        start = time.perf_counter()
        run = jax.jit(lambda q, k, v: attention(q, k, v, mask=mask))
        self.run = run.lower(*self.args).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self.run.memory_analysis()
        self.temporaries = memory.temp_size_in_bytes / 2**20
        self.gflop = mask.flops(T, T, heads=N, head_dim=H) * B / 1e9
        self()

    def __call__(self, _=None) -> float:
        start = time.perf_counter()
        for x in self.run(*self.args):
            x.block_until_ready()
        return time.perf_counter() - start


def _row(times: list[float]) -> dict:
    ms = [1e3 * t for t in times]
    return {"min_ms": round(min(ms), 2), "median_ms": round(statistics.median(ms), 2)}


def measure(case, repeats: int, peer: Peer | None) -> dict:
    """Interleaved repetitions of one case."""
    ours = Ours(case)
    sides = {"ours": ours} | ({"peer": peer} if peer else {})
    times = {name: [] for name in sides}
    for side in sides.values():
        side(case)
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(side(case))
    row = {name: _row(t) for name, t in times.items()}
    row["compile_s"] = round(ours.compile_seconds, 2)
    row["temporaries_mb"] = round(ours.temporaries, 1)
    row["gflop"] = round(ours.gflop, 2)
    if peer:
        for key in ("min_ms", "median_ms"):
            speed = row["peer"][key] / row["ours"][key]
            row[f"speed_over_peer_{key[:-3]}"] = round(speed, 3)
    return row


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    flags = next((x for x in lines if x.startswith("flags")), "")
    amx = ", AMX-bf16" if "amx_bf16" in flags else ", no AMX"
    return (names[0] if names else platform.processor()) + amx


def main() -> int:
    """Run all cases and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="an interpreter with torch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    import jax

    peer = Peer(args.peer) if args.peer else None
    results = {n: measure(c, args.repeats, peer) for n, c in CASES.items()}
    results |= {n: measure(c, 3, None) for n, c in LONG.items()}
    if peer:
        peer.close()
    dense, window = (results[name] for name in LONG)
    share = window["gflop"] / dense["gflop"]
    taken = window["ours"]["min_ms"] / dense["ours"]["min_ms"]
    document = {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "threads": os.cpu_count(),
        "jax": jax.__version__,
        "results": results,
        "window512_16k_time_over_flop_share": round(taken / share, 3),
    }
    text = json.dumps(document, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
