"""What attention costs a decoded token where some kv heads stream (DuoAttention).

    python -m benchmarks.duo [--length=32768] [--sparsity=0.5] [--rounds=15]

A model of SmolLM2-135M's shape with random weights decodes behind `length` tokens, and
behind `near`, once with every kv head whole (`full`) and once with a share of them
streaming (`duo`), all four in turn so that other load hits all. Attention's share of a
token is the time behind `length` minus that behind `near`. By the formula duo's is
that of `full` times the ratio of what the slots grew by from `near` to `length`, in
bytes: 2 x head width x bytes x (full heads x tokens + streaming heads x (sinks +
window)). The caches hold random keys and values: cost depends on shapes. Writes
benchmarks/results/duo.json.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.compare import cpu_model
from benchmarks.quest import random_kv
from lclm.cache import make
from lclm.cache.base import Cache, measured_bytes
from lclm.config import Run
from lclm.language_model import DTYPES, LanguageModel
from lclm.models.decoder import init_params
from lclm.models.presets import preset
from lclm.ops.int8 import quantize_params
from lclm.ops.sampling import Sampler
from lclm.serve.session import Session

RESULTS = Path(__file__).parent / "results"


def model(args: argparse.Namespace) -> LanguageModel:
    """SmolLM2-135M's shape, or fewer layers of it, with random weights."""
    config = preset("smollm2-135m")
    (run,) = config.stack
    layers = args.layers or run.repeats
    config = dataclasses.replace(config, stack=(Run(run.group, layers),), eos=())
    params = init_params(config, jax.random.key(0))
    if args.quantize:
        params = quantize_params(params, args.quantize)
    return LanguageModel(config, params, dtype=DTYPES[args.dtype])


def filled(lm: LanguageModel, policy: str, tokens: int, steps: int) -> Session:
    """A session behind `tokens` tokens, every slot of its caches in use."""
    session = Session(
        lm._engine, make(policy), rows=1, length=tokens + steps, chunk=tokens
    )
    session.caches = tuple(
        Cache(
            tuple(
                random_kv(i, *group.k.shape[1:], group.k.dtype)
                for group in cache.groups
            ),
            cache.extra,
        )
        for i, cache in enumerate(session.caches)
    )
    return session


def decoder(session: Session, tokens: int, steps: int) -> Callable[[], None]:
    """A call that decodes `steps` tokens behind `tokens` others."""
    keys = jax.random.split(jax.random.key(0), 1)

    def call() -> None:
        session.start = np.full(1, tokens, np.int32)
        session.decode(
            np.ones(1, bool), keys, sampler=Sampler(), limit=steps, steps=steps, eos=()
        )
        jax.block_until_ready(session.last)

    return call


def in_turn(calls: dict, rounds: int, steps: int) -> dict:
    """Milliseconds a token of each call: median and minimum of interleaved runs."""
    times: dict = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began) / steps)
    return {
        name: {"median": statistics.median(found), "min": min(found)}
        for name, found in times.items()
    }


def share(of: dict[tuple[str, int], float], far: int, near: int) -> float:
    """duo's growth from `near` to `far` over that of full."""
    duo, full = (of[name, far] - of[name, near] for name in ("duo", "full"))
    return duo / full


def measure(args: argparse.Namespace) -> dict:
    """Times, bytes, and duo's share of both."""
    lm = model(args)
    duo = (
        f"duo:sinks={args.sinks},window={args.window},sparsity={args.sparsity},"
        f"gates={args.gates}"
    )
    cases = {
        (name, tokens): filled(lm, policy, tokens, args.steps)
        for name, policy in (("full", "full"), ("duo", duo))
        for tokens in (args.length, args.near)
    }
    held = {case: measured_bytes(session.caches) for case, session in cases.items()}
    calls = {
        case: decoder(session, case[1], args.steps) for case, session in cases.items()
    }
    times = in_turn(calls, args.rounds, args.steps)
    by_bytes = share(held, args.length, args.near)
    found = {"formula": by_bytes}
    for pick in ("median", "min"):
        ms = {case: row[pick] for case, row in times.items()}
        own = share(ms, args.length, args.near)
        found |= {f"share_{pick}": own, f"times_formula_{pick}": own / by_bytes}
    rows = [
        {"cache": name, "tokens": tokens, "cache_bytes": held[name, tokens]}
        | {f"ms_{pick}": round(ms, 4) for pick, ms in times[name, tokens].items()}
        for name, tokens in cases
    ]
    return {k: round(v, 4) for k, v in found.items()} | {"rows": rows}


def main() -> None:
    """Run and write the JSON."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--length", type=int, default=32768)
    flags.add_argument("--near", type=int, default=16)
    flags.add_argument("--sinks", type=int, default=64)
    flags.add_argument("--window", type=int, default=256)
    flags.add_argument("--sparsity", type=float, default=0.5)
    flags.add_argument("--gates", default="random:0", help="'' for the shipped ones")
    flags.add_argument("--steps", type=int, default=8)
    flags.add_argument("--rounds", type=int, default=15)
    flags.add_argument("--dtype", default="float32", choices=DTYPES)
    flags.add_argument("--quantize", help="int8")
    flags.add_argument("--layers", type=int, help="fewer than the model has")
    flags.add_argument("--out", type=Path, default=RESULTS / "duo.json")
    args = flags.parse_args()
    facts = {k: v for k, v in vars(args).items() if k != "out"}
    data = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "load_before": [round(x, 1) for x in os.getloadavg()],
        "settings": facts,
    }
    data |= measure(args)
    args.out.write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
