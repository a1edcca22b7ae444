"""Mamba-1 of the 130M shape on this CPU: ours against transformers-PyTorch.

    python -m benchmarks.mamba --peer-python=.venv-oracles/bin/python [--out FILE]

Random weights, float32, both sides in processes that stay up and take turns. Reading
`--length` tokens, and writing tokens behind a short text (the cost of one does not
depend on the length). `--depth` below 24 shortens a run: every layer costs the same.
Prints JSON with minima and medians in seconds and our speed as a multiple of theirs.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

from benchmarks.compare import Worker
from benchmarks.peers.protocol import Peer, prompts, serve

HERE = pathlib.Path(__file__).parent
BEFORE = 16  # tokens read before writing begins


def ours(settings: dict[str, Any]) -> Peer:
    """lclm as a user calls it, at settings["depth"] layers."""
    import jax

    from lclm.config import Run
    from lclm.language_model import LanguageModel
    from lclm.models.decoder import init_params
    from lclm.models.presets import preset
    from lclm.ops.int8 import quantize_params

    config = preset("mamba-130m")
    stack = (Run(config.stack[0].group, settings["depth"]),)
    config = dataclasses.replace(config, stack=stack, eos=())
    params = init_params(config, jax.random.key(0))
    if settings["quantize"]:
        params = quantize_params(params, settings["quantize"])
    lm = LanguageModel(config, params)

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        rows = prompts(config.vocab, request["length"], 1)
        began = time.perf_counter()
        context = lm.prefill(rows)
        if request["case"] == "prefill":
            seconds = time.perf_counter() - began
            return {"seconds": seconds, "tokens": request["length"]}
        made = context.generate([], request["new"])
        made = made[0] if isinstance(made, list) else made
        return {
            "seconds": made.stats.decode_seconds,
            "tokens": made.stats.new_tokens,
        }

    return measure


def start(args: argparse.Namespace) -> list[Worker]:
    """Both processes; a peer that cannot start ends the run."""
    room = {"threads": args.threads}
    model = {"num_hidden_layers": args.depth, "hidden_size": 768}
    torch = [str(args.peer_python), str(HERE / "peers" / "mamba_torch_peer.py")]
    mine = [sys.executable, "-m", "benchmarks.mamba", "--serve"]
    workers = [
        Worker("lclm", mine, room | {"depth": args.depth, "quantize": args.quantize}),
        Worker("PyTorch", torch, room | {"model": model}),
    ]
    for worker in workers:
        if "error" in worker.ready:
            raise SystemExit(f"{worker.name}: {worker.ready['error']}")
    return workers


def compare(request: dict[str, Any], workers: list[Worker], rounds: int) -> dict:
    """One unmeasured round, then `rounds` in turn."""
    seconds: dict[str, list[float]] = {w.name: [] for w in workers}
    for i in range(rounds + 1):
        for worker in workers:
            answer = worker.ask(request)
            if "error" in answer:
                raise SystemExit(f"{worker.name}: {answer['error']}")
            if i:
                seconds[worker.name].append(answer["seconds"] / answer["tokens"])
    row: dict[str, Any] = {"request": request}
    for pick in (min, statistics.median):
        each = {name: pick(s) for name, s in seconds.items()}
        row[f"{pick.__name__}_ms_per_token"] = {
            name: round(1e3 * s, 4) for name, s in each.items()
        }
        row[f"{pick.__name__}_ratio"] = round(each["PyTorch"] / each["lclm"], 2)
    return row


def main() -> int:
    """Run both cases and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", type=pathlib.Path)
    parser.add_argument("--serve", action="store_true", help="be our side")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quantize", help="int8: our weights as int8 rows")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    if args.serve:
        serve(ours)
        return 0
    if args.peer_python is None:
        parser.error("--peer-python: give a Python that has torch and transformers")
    workers = start(args)
    decode = {"case": "decode", "length": BEFORE, "new": args.new}
    prefill = {"case": "prefill", "length": args.length}
    results = {
        "decode": compare(decode, workers, args.rounds),
        "prefill": compare(prefill, workers, args.rounds),
    }
    for worker in workers:
        worker.close()
    document = {
        "date": datetime.date.today().isoformat(),
        "threads": args.threads,
        "layers": args.depth,
        "ours": args.quantize or "float32",
        "bars": {"prefill": 10, "decode": 2},
        "results": results,
    }
    text = json.dumps(document, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
