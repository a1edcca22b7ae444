"""Evicting caches beside kvpress: what a cut prompt still knows, and what it costs.

    python -m benchmarks.caches --peer-python=.venv-kvpress/bin/python
    python -m benchmarks.caches --peer-python=... --tasks [--length=2048 --budget=512]
    python -m benchmarks.caches --peer-python=... --speed --length=32768 --budget=2048
    python -m benchmarks.caches --memory [--length=65536] [--budget=2048]

Quality: a passage of a novel is read and cut to the budget, then the loss of the text
that follows it is taken; lclm with at=end (the form of the papers, and kvpress's) and
at=chunk (bounded throughout), kvpress with the same settings. Tasks: passkeys, needles
and five facts of one text, asked after the cut, so no cut knows its question. Speed:
tokens read and written a second, and the highest resident size over that of a prompt of
budget + chunk tokens. Same weights, interleaved, float32; --only names other sides,
`lclm int8` and `kvpress bf16`; --model takes another model of `lclm pull` or a GGUF
file of yours (Gemma 3). Memory (lclm alone): the highest resident size of a process
that reads `length` tokens with at=chunk, over that when it had read budget + chunk, as
a share of the budget's cache; a process a policy, from when its weights are loaded.
That peak may be the compiler's: `share_reading` takes both texts when all is compiled,
each from a heap whose free pages were given back. It has the allocator's noise in it,
of a few calls' working memory. What was measured with the same settings is not measured
again.
Writes benchmarks/results/caches_{quality,tasks,speed,memory}.json; another `length` has
a file of its own, caches_quality_7680.json.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.compare import Worker, cpu_model
from lclm.evals.base import Tokenizer

HERE = Path(__file__).parent
CHUNK = 512
OUR_PEER = [sys.executable, "-m", "benchmarks.peers.lclm_cache_peer"]
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
MEMORY = {
    "window": "window:window={budget}",
    **OURS,
    "h2o bits=4": OURS["h2o"] + ",bits=4",
    "locret": "locret:budget={budget}",
    "infinipot": "infinipot:budget={budget}",
}
# Those whose memory follows the text stand beside them: their budget is what a query
# reads (quest), or the streaming heads' (duo).
ASKED = {
    **OURS,
    "locret": "locret:budget={budget}",
    "infinipot": "infinipot:budget={budget},keep={half}",
    "quest": "quest:budget={budget}",
    "duo": "duo:sinks=64,window={half}",
    "quantised": "quantised:bits=2,residual=128",
}
# By kind: tokens of a text, budgets, and what else makes rows comparable.
SIZES = {
    "memory": (65536, [2048], ["chunk"]),
    "speed": (32768, [2048], ["new", "rounds"]),
    "tasks": (1024, [256], []),
    "quality": (3584, [256, 1024], ["after", "texts"]),
}


class Table:
    """Rows of one file, written as they are found and kept between equal commands."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.facts, self.rows = path, facts, []
        data = json.loads(path.read_text()) if path.exists() else {}
        if facts.items() <= data.items():
            self.rows = [row for row in data["rows"] if "error" not in row]

    def holds(self, known: dict[str, Any]) -> bool:
        """Whether a row of these settings was found without an error."""
        return any(known.items() <= row.items() for row in self.rows)

    def put(self, known: dict[str, Any], found: dict[str, Any]) -> None:
        """Add a row, show it and write the file."""
        print(json.dumps(known | found), file=sys.stderr)
        self.rows = [r for r in self.rows if not known.items() <= r.items()]
        self.rows.append(known | found)
        text = json.dumps(self.facts | {"rows": self.rows}, indent=1)
        self.path.write_text(text + "\n")


def libraries(peer_python: Path | None) -> dict[str, tuple[list[str], dict]]:
    """The command of each side, and what it is told beside the model."""
    found = {"lclm": (OUR_PEER, {}), "lclm int8": (OUR_PEER, {"quantize": "int8"})}
    if peer_python:
        line = [str(peer_python), str(HERE / "peers" / "kvpress_peer.py")]
        found |= {
            "kvpress": (line, {}),
            "kvpress bf16": (line, {"dtype": "bfloat16"}),
        }
    return found


def passages(
    tokenizer: Tokenizer, length: int, after: int, count: int
) -> list[tuple[list[int], list[int]]]:
    """Tokens of a novel the model is not trained further on, and those behind them."""
    from lclm.data import sources

    tokens = tokenizer.encode(sources.read("austen:novel=persuasion"))
    step = len(tokens) // count
    starts = [i * step for i in range(count)]
    return [
        (tokens[s : s + length], tokens[s + length : s + length + after])
        for s in starts
    ]


def every_way(
    args: argparse.Namespace, policies: dict[str, str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(how a text is cut, what a peer is told of it): methods, budgets, modes."""
    yield way("full", None, "full", "lclm", "full")
    for budget, (name, policy) in itertools.product(args.budget, policies.items()):
        if name not in (args.methods or policies):
            continue
        filled = policy.format(budget=budget, half=budget // 2, window=budget - 4)
        yield way(name, budget, "chunk", "lclm", filled)
        if name in SAME:
            same = f"{name}:budget={budget},at=end,{SAME[name]}"
            yield way(name, budget, "end", "lclm", same)
            yield way(name, budget, "end", "kvpress", None)


def way(
    name: str, budget: int | None, mode: str, library: str, cache: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns that tell one row from another, and the peer's settings."""
    known = {"method": name, "budget": budget, "at": mode, "library": library}
    return known, {"method": name, "budget": budget, "cache": cache}


def quality(
    workers: dict[str, Worker], args: argparse.Namespace, table: "Table"
) -> None:
    """Mean loss behind a cut passage, by method, budget and mode."""
    texts = passages(args.tokenizer, args.length, args.after, args.texts)
    for known, ask in every_way(args, OURS):
        if known["library"] not in workers or table.holds(known):
            continue
        answers = [
            workers[known["library"]].ask(ask | {"tokens": tokens, "after": after})
            for tokens, after in texts
        ]
        table.put(known, summary(answers))


def tasks(workers: dict[str, Worker], args: argparse.Namespace, table: "Table") -> None:
    """Answers found in cut texts, by method, budget and mode."""
    from benchmarks.cache_tasks import contexts

    tokenizer = args.tokenizer
    asked = contexts(tokenizer, args.length)
    for known, ask in every_way(args, ASKED):
        if known["library"] not in workers or table.holds(known):
            continue
        worker, points, answer = workers[known["library"]], {}, {}
        for each in asked:
            # One room for all texts: they share compiled programs.
            room = {"room": args.length + 128}
            answer = worker.ask(ask | each.request(tokenizer) | room)
            if "error" in answer:
                break
            points.setdefault(each.task, []).extend(
                each.points(tokenizer, answer["answers"])
            )
        if "error" in answer:
            table.put(known, {"error": answer["error"]})
            continue
        found = {f"{task} of {len(its)}": sum(its) for task, its in points.items()}
        table.put(known, {"cache_bytes": answer["cache_bytes"]} | found)


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over texts, or the first error."""
    errors = [a["error"] for a in answers if "error" in a]
    if errors:
        return {"error": errors[0]}
    losses = [a["nll"] for a in answers]
    return {"nll": statistics.mean(losses), "cache_bytes": answers[0]["cache_bytes"]}


def speed(workers: dict[str, Worker], args: argparse.Namespace, table: "Table") -> None:
    """Seconds to read `length` tokens and to write `new`; the peak above a floor."""
    (tokens, _), *_ = passages(args.tokenizer, args.length, 1, 1)
    for name, budget in itertools.product(args.methods or SAME, args.budget):
        known = {"method": name, "budget": budget}
        if all(table.holds(known | {"library": library}) for library in workers):
            continue
        short = tokens[: budget + CHUNK]
        cache = OURS[name].format(budget=budget, window=budget - 4)
        # Of one size for both texts, also where that depends on the room (pyramidkv).
        room = {"room": args.length + args.new}
        ask = known | {"cache": cache, "new": args.new} | room
        answers: dict[str, list] = {library: [] for library in workers}
        floors = {}
        for turn in range(args.rounds + 1):
            for library, worker in workers.items():
                if not turn:
                    floors[library] = worker.ask(ask | {"tokens": short})
                    continue
                answers[library].append(worker.ask(ask | {"tokens": tokens}))
        for library, found in answers.items():
            table.put(known | {"library": library}, costs(found, floors[library], args))


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


def memory(args: argparse.Namespace, model: Path, table: "Table") -> None:
    """A row a policy."""
    for budget, name in itertools.product(args.budget, args.methods or MEMORY):
        known = {"method": name, "budget": budget}
        if table.holds(known):
            continue
        cache = MEMORY.get(name, name).format(budget=budget, window=budget - 4)
        table.put(known, {"cache": cache} | share(args, model, cache, budget))


def share(
    args: argparse.Namespace, model: Path, cache: str, budget: int
) -> dict[str, Any]:
    """Peaks of one process, and how much more a long text takes than a short one."""
    from lclm.cache import make

    short = budget + args.chunk
    asks = [{"any": short}, {"any": short, "trim": True}, {"any": args.length}]
    asks[2]["trim"] = True
    worker = Worker("lclm", OUR_PEER, {"gguf": str(model), "threads": args.threads})
    found = [worker.ready]
    if "error" not in worker.ready:
        # pyramidkv's layers have one size for both where there is room for the long
        # text, which a bounded cache does not allocate.
        room = 0 if make(cache).kept is None else args.length
        same = {"cache": cache, "chunk": args.chunk, "room": room}
        found = [worker.ask(same | ask) for ask in asks]
    worker.close()
    errors = [a["error"] for a in found if "error" in a]
    if errors:
        return {"error": errors[0]}
    first, again, long = (a["peak_rss"] for a in found)
    held = found[2]["cache_bytes"]
    return {
        "first_peak": first,
        "short_peak": again,
        "long_peak": long,
        "cache_bytes": held,
        "share": round((max(first, long) - first) / held, 4),
        "share_reading": round((long - again) / held, 4),
        "read": round(args.length / found[2]["read_seconds"], 1),
    }


def main() -> None:
    """Measure and write the JSON."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--peer-python", type=Path, help="a Python with kvpress")
    flags.add_argument("--speed", action="store_true")
    flags.add_argument("--memory", action="store_true")
    flags.add_argument("--tasks", action="store_true")
    flags.add_argument("--model", type=Path, default=Path("smollm2-135m"))
    flags.add_argument("--length", type=int)
    flags.add_argument("--chunk", type=int, default=CHUNK, help="of --memory")
    flags.add_argument("--after", type=int, default=256)
    flags.add_argument("--texts", type=int, default=3)
    flags.add_argument("--budget", type=int, action="append")
    flags.add_argument("--methods", action="append")
    flags.add_argument("--only", action="append", help="lclm, lclm int8, kvpress, ...")
    flags.add_argument("--new", type=int, default=64)
    flags.add_argument("--rounds", type=int, default=1)
    flags.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = flags.parse_args()
    from lclm import hub

    model = args.model if args.model.suffix == ".gguf" else hub.pull(str(args.model))
    kinds = [kind for kind in ("memory", "speed", "tasks") if getattr(args, kind)]
    kind = kinds[0] if kinds else "quality"
    length, budgets, names = SIZES[kind]
    args.length = args.length or length
    args.budget = args.budget or budgets
    facts = {name: getattr(args, name) for name in ["length", "threads", *names]}
    facts = {"cpu": cpu_model(), "model": model.name} | facts
    name = kind if args.length == length else f"{kind}_{args.length}"
    table = Table(HERE / "results" / f"caches_{name}.json", facts)
    if args.memory:
        memory(args, model, table)
        return
    args.tokenizer = hub.load(str(model), packed="int4").tokenizer
    room = {"gguf": str(model), "threads": args.threads}
    workers = {
        name: Worker(name, line, room | settings)
        for name, (line, settings) in libraries(args.peer_python).items()
        if name in (args.only or ["lclm", "kvpress"])
    }
    try:
        {"speed": speed, "tasks": tasks, "quality": quality}[kind](workers, args, table)
    finally:
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    main()
