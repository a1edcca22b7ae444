"""SmolLM2 on this CPU: lclm, transformers-PyTorch and llama.cpp, one run, interleaved.

    make bench                                  # builds the peers, then runs this
    python -m benchmarks.compare --peer-python=.venv-oracles/bin/python --quick

Every peer is a process that stays up and measures when asked, so that slow spells of
the machine fall on all of them: A B C A B C, in another order each round.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VERSIONS = ("jax", "jaxlib", "flax", "numpy")
PEER_VERSIONS = ("torch", "transformers", "llama_cpp_python")


# llama-cpp-python evaluates one sequence at a time.
BATCHED = ("lclm fp32", "lclm bf16", "lclm int8", "PyTorch fp32", "PyTorch bf16")
STREAMING = "streaming:sinks=4,window=1020"
STREAMING_QUICK = "streaming:sinks=4,window=28"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: reading `length` tokens, or writing `new` behind them."""

    case: str
    length: int
    batch: int = 1
    new: int = 0
    cache: str = "full"
    rounds: int = 5
    peers: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """As it stands in tables: `decode 8 x 512`."""
        cache = "" if self.cache == "full" else f" {self.cache.partition(':')[0]}"
        return f"{self.case} {self.batch} x {self.length:,}{cache}"


class Worker:
    """A peer process and the lines that go to and fro."""

    def __init__(self, name: str, command: Sequence[str], settings: dict[str, Any]):
        self.name = name
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(settings["threads"]),
            "TQDM_DISABLE": "1",
        }
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=HERE.parent,
        )
        self.ready = self.ask(settings)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One answer; a dead or failing peer is an answer with an "error"."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"{self.name} ended with {self.process.wait()}"}
        return json.loads(line)

    def close(self) -> None:
        """End of input, end of process."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def cases(quick: bool) -> list[Case]:
    """The whole comparison, or a minute of it that proves it works."""
    ours = ("lclm fp32", "lclm bf16")
    if quick:
        return [
            Case("prefill", 64, rounds=2),
            Case("decode", 64, new=8, rounds=2),
            Case("decode", 64, batch=8, new=8, rounds=2, peers=BATCHED),
            Case("decode", 96, new=8, rounds=2, peers=ours, cache=STREAMING_QUICK),
        ]
    found = [Case("prefill", n, rounds=r) for n, r in ((512, 7), (2048, 5), (4096, 3))]
    found += [Case("decode", n, new=64) for n in (512, 4096)]
    found += [Case("decode", n, batch=8, new=32, peers=BATCHED) for n in (512, 4096)]
    found += [
        Case("decode", 32768, new=64, peers=("lclm int8",), cache=cache, rounds=5)
        for cache in ("full", STREAMING)
    ]
    return found


def start(args: argparse.Namespace) -> list[Worker]:
    """Start every peer; one that cannot start is named and left out."""
    room = {"gguf": str(args.gguf), "threads": args.threads, "room": args.room}
    ours = [sys.executable, "-m", "benchmarks.peers.lclm_peer"]
    torch = [str(args.peer_python), str(HERE / "peers" / "torch_peer.py")]
    llama = [str(args.peer_python), str(HERE / "peers" / "llamacpp_peer.py")]
    wanted = {
        "lclm fp32": (ours, {"dtype": "float32"}),
        "lclm bf16": (ours, {"dtype": "bfloat16"}),
        "lclm int8": (ours, {"dtype": "bfloat16", "quantize": "int8"}),
        "PyTorch fp32": (torch, {"dtype": "float32"}),
        "PyTorch bf16": (torch, {"dtype": "bfloat16"}),
        "llama.cpp": (llama, {}),
    }
    workers = []
    for name, (command, extra) in wanted.items():
        if args.only and name not in args.only:
            continue
        worker = Worker(name, command, room | extra)
        if "error" in worker.ready:
            print(f"{name} left out: {worker.ready['error']}", file=sys.stderr)
        else:
            workers.append(worker)
    return workers


def measure(case: Case, workers: Sequence[Worker], pause: float) -> dict[str, Any]:
    """Alternate the peers for the rounds of one case, after one unmeasured each."""
    asked = [w for w in workers if not case.peers or w.name in case.peers]
    request = dataclasses.asdict(case)
    found: dict[str, list[dict[str, Any]]] = {}
    errors = {}
    for turn in range(case.rounds + 1):
        shift = turn % max(len(asked), 1)
        for worker in asked[shift:] + asked[:shift]:
            if worker.name in errors:
                continue
            time.sleep(pause)
            answer = worker.ask(request)
            if "error" in answer:
                errors[worker.name] = answer["error"]
                print(f"{worker.name}: {answer['error']}", file=sys.stderr)
            elif turn:
                found.setdefault(worker.name, []).append(answer)
    kept = {name: rows for name, rows in found.items() if name not in errors}
    results = {name: digest(rows) for name, rows in kept.items()}
    return {**request, "title": case.title, "results": results, "errors": errors}


def digest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, best and all seconds; tokens a second; the highest resident size."""
    seconds = [row["seconds"] for row in rows]
    tokens = rows[0]["tokens"]
    found = {
        "seconds": seconds,
        "tokens": tokens,
        "median": tokens / statistics.median(seconds),
        "best": tokens / min(seconds),
        "peak_rss": max(row["peak_rss"] for row in rows),
    }
    return found | {k: rows[-1][k] for k in ("said", "cache_bytes") if k in rows[-1]}


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Ours over each peer, medians of one run: `lclm bf16 / PyTorch bf16`."""
    ours = [n for n in results if n.startswith("lclm")]
    peers = [n for n in results if not n.startswith("lclm")]
    return {
        f"{a} / {b}": results[a]["median"] / results[b]["median"]
        for a in ours
        for b in peers
    }


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Where and with what it was measured."""
    names = ",".join(repr(n) for n in PEER_VERSIONS)
    code = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) "
    code += f"for n in ({names},)}}))"
    peers = subprocess.run(
        [str(args.peer_python), "-c", code], capture_output=True, text=True, check=False
    )
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    versions |= json.loads(peers.stdout) if peers.returncode == 0 else {}
    return {
        "cpu": cpu_model(),
        "threads": args.threads,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average_before": os.getloadavg(),
    }


def cpu_model() -> str:
    """The processor, and whether it multiplies bfloat16 matrices in hardware."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines: dict[str, str] = {}
    for row in text.splitlines():
        key, _, value = row.partition(":")
        lines.setdefault(key.strip(), value.strip())
    flags = set(lines.get("flags", "").split())
    extra = [f for f in ("avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{lines.get('model name', platform.machine())} ({', '.join(extra)})"


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="default: SmolLM2-135M, pulled")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--room", type=int, default=4096 + 256)
    parser.add_argument("--only", action="append", help="peer by name; repeatable")
    parser.add_argument("--cases", action="append", help="words of a title; repeatable")
    parser.add_argument("--pause", type=float, default=0.3, help="between measurements")
    parser.add_argument("--quick", action="store_true", help="prove that it works")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "compare")
    args = parser.parse_args()
    if args.gguf is None:
        from lclm import hub

        args.gguf = hub.pull("smollm2-135m")
    now = datetime.datetime.now(datetime.UTC)
    record = {
        "date": now.date().isoformat(),
        "command": command(args),
        "model": args.gguf.name,
        **machine(args),
        "cases": [],
    }
    from benchmarks.report import write

    workers = start(args)
    try:
        for case in cases(args.quick):
            if args.cases and not any(words in case.title for words in args.cases):
                continue
            row = measure(case, workers, args.pause)
            row["ratios"] = ratios(row["results"])
            print(json.dumps(row["ratios"]), case.title, file=sys.stderr)
            record["cases"].append(row)
            write(record, args.out)
    finally:
        for worker in workers:
            worker.close()


def command(args: argparse.Namespace) -> str:
    """The command as a reader would type it, without this machine's folders."""
    words = ["python -m benchmarks.compare --peer-python=PYTHON3.11"]
    words += [f"--threads={args.threads}", f"--room={args.room}"]
    words += [f"--only={name!r}" for name in args.only or ()]
    words += [f"--cases={title!r}" for title in args.cases or ()]
    words += ["--quick"] * args.quick
    return " ".join(words)


if __name__ == "__main__":
    main()
