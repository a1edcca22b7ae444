"""Evicting caches beside kvpress: what a cut prompt still knows, and what it costs.

    python -m benchmarks.caches --peer-python=.venv-kvpress/bin/python
    python -m benchmarks.caches --peer-python=... --speed --length=32768 --budget=2048

Quality: a passage of a novel is read and cut to the budget, then the loss of the text
that follows it is taken; lclm with at=end (the form of the papers, and kvpress's) and
at=chunk (bounded throughout), kvpress with the same settings. Speed: reading and
writing, seconds of the same tokens, and the highest resident size over that of a prompt
of budget + chunk tokens. Same weights, float32, interleaved. Writes
benchmarks/results/caches_{quality,speed}.json.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.compare import Worker, cpu_model

HERE = Path(__file__).parent
CHUNK = 512
# What kvpress protects: nothing but the window of SnapKV's queries and four sinks of
# expected attention.
SAME = {
    "snapkv": "recent=32",
    "pyramidkv": "recent=32",
    "tova": "recent=1",
    "knorm": "sinks=0,recent=1",
    "keydiff": "sinks=0,recent=1",
    "expected_attention": "sinks=4,recent=1",
}
OURS = {
    "streaming": "streaming:sinks=4,window={window}",
    "h2o": "h2o:budget={budget}",
    **{name: name + ":budget={budget}" for name in SAME},
}


def passages(length: int, after: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Tokens of a novel the model is not trained further on, and those behind them."""
    from lclm import hub
    from lclm.data import sources

    tokenizer = hub.load("smollm2-135m", packed="int4").tokenizer
    tokens = tokenizer.encode(sources.read("austen:novel=persuasion"))
    step = len(tokens) // count
    starts = [i * step for i in range(count)]
    return [
        (tokens[s : s + length], tokens[s + length : s + length + after])
        for s in starts
    ]


def quality(workers: dict[str, Worker], args: argparse.Namespace) -> list[dict]:
    """Mean loss behind a cut passage, by method, budget and mode."""
    texts, rows = passages(args.length, args.after, args.texts), []
    asks = [("full", None, "full", "lclm", "full")]
    for budget in args.budget:
        for name, policy in OURS.items():
            filled = policy.format(budget=budget, window=budget - 4)
            asks.append((name, budget, "chunk", "lclm", filled))
            if name in SAME:
                same = f"{name}:budget={budget},at=end,{SAME[name]}"
                asks.append((name, budget, "end", "lclm", same))
                asks.append((name, budget, "end", "kvpress", None))
    for name, budget, mode, library, cache in asks:
        if library not in workers:
            continue
        answers = [
            workers[library].ask(
                {
                    "tokens": tokens,
                    "after": after,
                    "method": name,
                    "budget": budget,
                    "cache": cache,
                }
            )
            for tokens, after in texts
        ]
        row = {"method": name, "budget": budget, "at": mode, "library": library}
        rows.append(row | summary(answers))
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over texts, or the first error."""
    errors = [a["error"] for a in answers if "error" in a]
    if errors:
        return {"error": errors[0]}
    losses = [a["nll"] for a in answers]
    return {"nll": statistics.mean(losses), "cache_bytes": answers[0]["cache_bytes"]}


def speed(workers: dict[str, Worker], args: argparse.Namespace) -> list[dict]:
    """Seconds to read `length` tokens and to write `new`; the peak above a floor."""
    (tokens, _), *_ = passages(args.length, 1, 1)
    rows = []
    for name in args.methods or SAME:
        for budget in args.budget:
            short = tokens[: budget + CHUNK]
            cache = OURS[name].format(budget=budget, window=budget - 4)
            ask = {"method": name, "budget": budget, "cache": cache, "new": args.new}
            answers: dict[str, list] = {library: [] for library in workers}
            floors = {}
            for turn in range(args.rounds + 1):
                for library, worker in workers.items():
                    if not turn:
                        floors[library] = worker.ask(ask | {"tokens": short})
                        continue
                    answers[library].append(worker.ask(ask | {"tokens": tokens}))
            for library, found in answers.items():
                rows.append(
                    {"method": name, "budget": budget, "library": library}
                    | costs(found, floors[library], args)
                )
                print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def costs(found: list[dict], floor: dict, args: argparse.Namespace) -> dict[str, Any]:
    """Best rates of the rounds, bytes held, and the peak above the short prompt's."""
    errors = [a["error"] for a in [floor, *found] if "error" in a]
    if errors:
        return {"error": errors[0]}
    return {
        "read": args.length / min(a["read_seconds"] for a in found),
        "write": args.new / min(a["decode_seconds"] for a in found),
        "cache_bytes": found[0]["cache_bytes"],
        "peak_above_short": max(a["peak_rss"] for a in found) - floor["peak_rss"],
    }


def main() -> None:
    """Measure and write the JSON."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--peer-python", type=Path, help="a Python with kvpress")
    flags.add_argument("--speed", action="store_true")
    flags.add_argument("--length", type=int, default=3584)
    flags.add_argument("--after", type=int, default=256)
    flags.add_argument("--texts", type=int, default=3)
    flags.add_argument("--budget", type=int, action="append")
    flags.add_argument("--methods", action="append")
    flags.add_argument("--new", type=int, default=64)
    flags.add_argument("--rounds", type=int, default=1)
    flags.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = flags.parse_args()
    args.budget = args.budget or ([2048] if args.speed else [256, 1024])
    from lclm import hub

    room = {"gguf": str(hub.pull("smollm2-135m")), "threads": args.threads}
    commands = {"lclm": [sys.executable, "-m", "benchmarks.peers.lclm_cache_peer"]}
    if args.peer_python:
        script = str(HERE / "peers" / "kvpress_peer.py")
        commands["kvpress"] = [str(args.peer_python), script]
    workers = {name: Worker(name, line, room) for name, line in commands.items()}
    try:
        rows = (speed if args.speed else quality)(workers, args)
    finally:
        for worker in workers.values():
            worker.close()
    kind = "speed" if args.speed else "quality"
    facts = {k: v for k, v in vars(args).items() if k != "peer_python"}
    out = HERE / "results" / f"caches_{kind}.json"
    out.write_text(json.dumps({"cpu": cpu_model(), **facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
