"""Training steps of SmolLM2 on this CPU: lclm beside transformers and peft on PyTorch.

    python -m benchmarks.training --peer-python=.venv-oracles/bin/python

One interleaved run, float32 master weights, AdamW: all parameters and LoRA (rank 8 on
q, k, v, o) at 1 x 1,024; all parameters at 1 x 8,192 with full attention, and with
S2-Attn in groups of 2,048.
"""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path

from benchmarks.compare import HERE, Case, Worker, machine, measure, ratios
from benchmarks.report import write

OURS, PEERS = ("lclm fp32", "lclm bf16"), ("PyTorch fp32", "PyTorch bf16")
CASES = (
    Case("train", 1024, rounds=5),
    Case("lora", 1024, rounds=5),
    Case("train", 8192, rounds=2, peers=("lclm fp32", *PEERS)),
    Case("s2", 8192, rounds=2, peers=("lclm fp32",)),
)


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="default: SmolLM2-135M, pulled")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cases", action="append", help="words of a title; repeatable")
    parser.add_argument("--only", action="append", help="peer by name; repeatable")
    parser.add_argument("--pause", type=float, default=0.3, help="between measurements")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training")
    args = parser.parse_args()
    if args.gguf is None:
        from lclm import hub

        args.gguf = hub.pull("smollm2-135m")
    chosen = [
        c for c in CASES if not args.cases or any(w in c.title for w in args.cases)
    ]
    words = "".join(f" --cases={c!r}" for c in args.cases or ())
    words += "".join(f" --only={name!r}" for name in args.only or ())
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python -m benchmarks.training --peer-python=PYTHON3.11{words}",
        "model": args.gguf.name,
        **machine(args),
        "cases": [],
    }
    workers = start(args)
    try:
        for case in chosen:
            row = measure(case, workers, args.pause)
            row["ratios"] = ratios(row["results"])
            print(json.dumps(row["ratios"]), case.title, file=sys.stderr)
            record["cases"].append(row)
            write(record, args.out)
    finally:
        for worker in workers:
            worker.close()


def start(args: argparse.Namespace) -> list[Worker]:
    """Every peer, as a process that stays up."""
    ours = [sys.executable, "-m", "benchmarks.peers.lclm_train_peer"]
    torch = [str(args.peer_python), str(HERE / "peers" / "torch_train_peer.py")]
    shared = {"gguf": str(args.gguf), "threads": args.threads}
    found = []
    for name in (*OURS, *PEERS):
        if args.only and name not in args.only:
            continue
        dtype = "bfloat16" if name.endswith("bf16") else "float32"
        command = ours if name in OURS else torch
        worker = Worker(name, command, shared | {"dtype": dtype})
        if "error" in worker.ready:
            print(f"{name} left out: {worker.ready['error']}", file=sys.stderr)
        else:
            found.append(worker)
    return found


if __name__ == "__main__":
    main()
