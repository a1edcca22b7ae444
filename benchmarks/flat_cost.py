"""What a token costs after 8k tokens and after a million, in one bounded cache.

    python -m benchmarks.flat_cost [--length 1000000] [--quantize int8]

SmolLM2-135M reads the King James Bible through StreamingLLM in chunks of 512. Copies of
the reading made at 8k, 64k and 256k tokens are kept, and at the end all of them and the
whole one read the same chunk and decode the same number of tokens in turn, so that
other load on the machine hits all. Writes benchmarks/results/flat_cost.json.
"""

import argparse
import datetime
import json
import resource
import statistics
import time
from pathlib import Path

import jax
import numpy as np

import lclm
from benchmarks.compare import cpu_model
from lclm.data import sources
from lclm.ops.sampling import Sampler

RESULTS = Path(__file__).parent / "results"
MARKS = (8192, 65536, 262144)
CHUNK = 512
DECODED = 64


def read_seconds(session, row: np.ndarray) -> float:
    """Seconds to read one chunk."""
    began = time.perf_counter()
    session.read(row)
    jax.block_until_ready(session.last)
    return time.perf_counter() - began


def decode_seconds(session) -> float:
    """Seconds to decode `DECODED` tokens in one dispatch."""
    keys = jax.random.split(jax.random.key(0), 1)
    began = time.perf_counter()
    session.decode(
        np.ones(1, bool), keys, sampler=Sampler(), limit=DECODED, steps=DECODED, eos=()
    )
    return time.perf_counter() - began


def side_by_side(sessions: dict[int, object], row: np.ndarray, rounds: int) -> dict:
    """Milliseconds a token of reading and decoding behind each length, in turn."""
    times = {length: {"read": [], "decode": []} for length in sessions}
    for session in sessions.values():
        read_seconds(session, row)
        decode_seconds(session)
    for _ in range(rounds):
        for length, session in sessions.items():
            times[length]["read"].append(1e3 * read_seconds(session, row) / CHUNK)
            times[length]["decode"].append(1e3 * decode_seconds(session) / DECODED)
    return {
        length: {
            f"{what}_ms_{name}": round(pick(t), 4)
            for what, t in kinds.items()
            for name, pick in (("median", statistics.median), ("min", min))
        }
        for length, kinds in times.items()
    }


def main() -> None:
    """Run and write the JSON."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--length", type=int, default=1_000_000)
    flags.add_argument("--rounds", type=int, default=15)
    flags.add_argument("--dtype", default="bfloat16")
    flags.add_argument("--quantize")
    flags.add_argument("--cache", default="streaming:sinks=4,window=1020")
    args = flags.parse_args()
    lm = lclm.load("smollm2-135m", dtype=args.dtype, quantize=args.quantize)
    tokens = np.array(lm.encode(sources.read("kjv")))
    need = args.length + CHUNK
    tokens = np.tile(tokens, -(-need // len(tokens)))[None, :need]
    session = lm.prefill(tokens[:, :CHUNK], args.cache, chunk=CHUNK).session
    whole = CHUNK * (args.length // CHUNK)
    kept, peaks, began = {}, {}, time.perf_counter()
    for start in range(CHUNK, whole, CHUNK):
        session.read(tokens[:, start : start + CHUNK])
        done = start + CHUNK
        if done in MARKS:
            kept[done] = session.fork()
        if done in MARKS or done == whole:
            jax.block_until_ready(session.last)
            kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peaks[done] = round(kib / 1024, 1)
            rate = done / (time.perf_counter() - began)
            print(f"{done:,} tokens, {rate:.0f} tokens/s, peak {peaks[done]} MiB")
    kept[whole] = session
    data = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "jax": jax.__version__,
        "settings": vars(args),
        "read_seconds": round(time.perf_counter() - began, 1),
        "peak_rss_mib": peaks,
        "behind": side_by_side(kept, tokens[:, -CHUNK:], args.rounds),
    }
    path = RESULTS / "flat_cost.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(data["behind"], indent=1))


if __name__ == "__main__":
    main()
