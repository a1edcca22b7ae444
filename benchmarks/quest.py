"""What a decoded token costs behind 32k others, read whole and by Quest's pages.

    python -m benchmarks.quest [--length 32768] [--rounds 15] [--models float32]

Two measurements, each interleaved so that other load on the machine hits all, with
minima and medians:

* layer: one attention of SmolLM2-135M (9 query heads, 3 kv heads of 64) over a filled
  cache, dense, and Quest at each budget; `CHAIN` layers with caches of their own run
  behind each other, as in a model.
* model: tokens of SmolLM2-135M through the engine's own decoding loop. The caches are
  filled with random keys and values, not by reading a text: cost depends on shapes.

Writes benchmarks/results/quest.json.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lclm
from benchmarks.compare import cpu_model
from lclm.cache import make
from lclm.cache.base import KV, Cache
from lclm.ops.sampling import Sampler
from lclm.serve.session import Session
from pallas_kernels.decode import (
    Selection,
    cached_attention,
    page_bounds,
    paged_attention,
)

RESULTS = Path(__file__).parent / "results"
PAGE, BUDGETS, CHAIN = 16, (1024, 2048), 4
MODELS = {
    "float32": {},
    "float32 int8": {"quantize": "int8"},
    "bfloat16 int8": {"dtype": "bfloat16", "quantize": "int8"},
}


def random_kv(seed: int, heads: int, slots: int, size: int, dtype) -> KV:
    """A cache of one row with a token in every slot; every 1024th is the same."""
    few = np.random.default_rng(seed).normal(size=(2, 1, heads, 1024, size))
    times = -(-slots // 1024)
    k, v = (jnp.asarray(np.tile(x, (1, 1, times, 1))[:, :, :slots], dtype) for x in few)
    return KV(k, v, jnp.arange(slots, dtype=jnp.int32)[None, None])


def in_turn(calls: dict, rounds: int, per: int) -> dict:
    """Milliseconds of each call over `per`: minimum and median of interleaved runs."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began) / per)
    found = {
        name: {"ms_min": min(t), "ms_median": statistics.median(t)}
        for name, t in times.items()
    }
    for row in found.values():
        row["times_dense_min"] = found["dense"]["ms_min"] / row["ms_min"]
        row["times_dense_median"] = found["dense"]["ms_median"] / row["ms_median"]
    return {n: {k: round(x, 3) for k, x in row.items()} for n, row in found.items()}


def layer(length: int, rounds: int, dtype) -> dict:
    """One layer's attention of one token behind `length` - 1 others."""
    kvs = [random_kv(i, 3, length, 64, dtype) for i in range(CHAIN)]
    whole = jnp.full(1, length, jnp.int32)
    bounds = [page_bounds(kv.k, whole, PAGE) for kv in kvs]
    q_pos = whole[:, None] - 1

    def chain(attend):
        @jax.jit
        def run(q, kvs, bounds):
            for kv, limits in zip(kvs, bounds, strict=True):
                q = attend(q, kv, limits).astype(q.dtype)
            return q

        q = jax.random.normal(jax.random.key(0), (1, 1, 9, 64), jnp.float32)
        return lambda: jax.block_until_ready(run(q, kvs, bounds))

    calls = {
        "dense": chain(
            lambda q, kv, _: cached_attention(
                q, kv.k, kv.v, q_pos, kv.pos, length=length
            )[0]
        )
    }
    for budget in BUDGETS:
        choice = Selection(PAGE, budget // PAGE)
        calls[f"quest {budget}"] = chain(
            lambda q, kv, limits, choice=choice: paged_attention(
                q, kv.k, kv.v, limits, q_pos, choice
            )[0]
        )
    return in_turn(calls, rounds, CHAIN)


def model(options: dict, length: int, rounds: int, steps: int) -> dict:
    """A token of the whole model behind `length` - `steps` others."""
    lm = lclm.load("smollm2-135m", **options)
    engine = lm._engine
    sessions = {"dense": Session(engine, make("full"), rows=1, length=16, chunk=16)}
    for budget in BUDGETS:
        policy = make(f"quest:budget={budget},page={PAGE}")
        sessions[f"quest {budget}"] = Session(
            engine, policy, rows=1, length=16, chunk=16
        )
    known = engine.layers
    kvs = [
        random_kv(i, x.spec.kv_heads, length, x.spec.head_dim, engine.cache_dtype)
        for i, x in enumerate(known)
    ]
    whole = jnp.full(1, length, jnp.int32)
    bounds = [page_bounds(kv.k, whole, PAGE) for kv in kvs]

    def caller(session):
        """Decode on the one set of caches, which every session hands on."""
        marks = [bool(cache.extra) for cache in session.caches]
        session.length = length

        def call():
            session.caches = tuple(
                Cache((kv,), {"bounds": limits} if mark else {})
                for kv, limits, mark in zip(kvs, bounds, marks, strict=True)
            )
            session.start = np.full(1, length - steps, np.int32)
            session.decode(
                np.ones(1, bool),
                jax.random.split(jax.random.key(0), 1),
                sampler=Sampler(),
                limit=steps,
                steps=steps,
                eos=(),
            )
            jax.block_until_ready(session.last)
            for i, cache in enumerate(session.caches):
                kvs[i] = cache.groups[0]
                bounds[i] = cache.extra.get("bounds", bounds[i])

        return call

    calls = {name: caller(session) for name, session in sessions.items()}
    return in_turn(calls, rounds, steps)


def main() -> None:
    """Run and write the JSON."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--length", type=int, default=32768)
    flags.add_argument("--rounds", type=int, default=15)
    flags.add_argument("--steps", type=int, default=8)
    flags.add_argument("--models", default=",".join(MODELS), help="'' for none")
    args = flags.parse_args()
    data = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "load_before": [round(x, 1) for x in os.getloadavg()],
        "settings": vars(args) | {"page": PAGE, "budgets": BUDGETS},
        "layer": {
            name: layer(args.length, 4 * args.rounds, jnp.dtype(name))
            for name in ("float32", "bfloat16")
        },
    }
    print(json.dumps(data["layer"], indent=1), flush=True)
    data["model"] = {}
    for name in filter(None, args.models.split(",")):
        found = model(MODELS[name], args.length, args.rounds, args.steps)
        data["model"][name] = found
        print(name, json.dumps(found, indent=1), flush=True)
        path = RESULTS / "quest.json"
        path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
