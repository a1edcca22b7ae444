"""What each cache loses past the trained length, against re-reading the window.

    python -m benchmarks.past_trained

SmolLM2-135M reads the King James Bible; the tokens from 8,192 on are scored by sliding
window with re-computation, StreamingLLM and the window without sinks, all on the same
tokens, and by full attention. Writes benchmarks/results/past_trained.json.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

import lclm
from benchmarks.compare import cpu_model
from lclm.data import sources

RESULTS = Path(__file__).parent / "results"


def scored(lm, tokens: np.ndarray, cache: str, start: int) -> tuple[np.ndarray, float]:
    """Losses of the tokens from `start` on, and seconds per token read."""
    lm.nll(tokens[:, :1024], cache=cache)  # compile
    began = time.perf_counter()
    nll = lm.nll(tokens, cache=cache)[0, start - 1 :]
    return nll, (time.perf_counter() - began) / tokens.shape[1]


def recomputed(lm, tokens: np.ndarray, window: int, start: int):
    """The same losses, each after a fresh pass over the `window` tokens before it."""
    cache = f"recompute:window={window}"
    text = tokens[:, start - window :]
    lm.nll(text[:, : window + 2], cache=cache)  # compile
    began = time.perf_counter()
    nll = lm.nll(text, cache=cache)[0, window - 1 :]
    return nll, (time.perf_counter() - began) / len(nll)


def main() -> None:
    """Run and write the JSON."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--targets", type=int, default=192)
    flags.add_argument("--start", type=int, default=8192)
    flags.add_argument("--source", default="kjv")
    args = flags.parse_args()
    lm = lclm.load("smollm2-135m")
    text = sources.read(args.source)[: 8 * (args.start + args.targets)]
    tokens = np.array([lm.encode(text)[: args.start + args.targets]])
    runs = {
        "recompute:window=1024": recomputed(lm, tokens, 1024, args.start),
        "streaming:sinks=4,window=1020": None,
        "window:window=1024": None,
        "full": None,
    }
    for cache, run in runs.items():
        runs[cache] = run or scored(lm, tokens, cache, args.start)
    base = runs["recompute:window=1024"][0]
    rows = [
        {
            "cache": cache,
            "nll": float(nll.mean()),
            "over_recompute": float((nll - base).mean()),
            "standard_error": float((nll - base).std() / len(nll) ** 0.5),
            "ms_per_token": 1e3 * seconds,
        }
        for cache, (nll, seconds) in runs.items()
    ]
    record = {
        "command": f"python -m benchmarks.past_trained --targets {args.targets}",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "jax": jax.__version__,
        "source": args.source,
        "start": args.start,
        "targets": len(base),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "past_trained.json"
    path.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
