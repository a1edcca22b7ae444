"""Passkeys under DuoAttention with trained gates, random gates, and StreamingLLM.

    python experiments/duo_gates/evaluate.py 2048
    python experiments/duo_gates/evaluate.py 2048 --sparsity 0.75

All bounded caches get the bytes of `duo` at the given length: streaming the same sinks
and as many recent tokens as fit. The prompts of one policy are one ragged batch. Every
finished policy is a line of results.jsonl and is not asked again.
"""

import argparse
import json
import time
from pathlib import Path

import lclm
from lclm.evals import passkey

RESULTS = Path(__file__).with_name("results.jsonl")
SINKS, WINDOW = 64, 256


def caches(lm, length: int, sparsity: float, gates: str) -> dict[str, str]:
    """The policies side by side, by a short name."""
    duo = f"duo:sinks={SINKS},window={WINDOW},sparsity={sparsity}"
    room = lm.cache_bytes(f"{duo},gates=random", length)
    token = lm.cache_bytes("streaming:sinks=1,window=2", length)
    token -= lm.cache_bytes("streaming:sinks=1,window=1", length)
    fixed = lm.cache_bytes(f"streaming:sinks={SINKS},window=1", length)
    window = 1 + (room - fixed) // token
    trained = f"{duo},gates={gates}" if gates else duo
    return {
        "trained": trained,
        "streaming": f"streaming:sinks={SINKS},window={window}",
        **{f"random {seed}": f"{duo},gates=random:{seed}" for seed in range(3)},
        "full": "full",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("length", type=int)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--gates", default="", help="a file; default: the shipped one")
    parser.add_argument("--only", help="policies whose name begins so, comma-separated")
    args = parser.parse_args()
    lm = lclm.load("smollm2-135m", quantize="int8")
    depths = [0.1, 0.3, 0.5, 0.7, 0.9]
    cells = [(d, seed) for seed in range(args.trials) for d in depths]
    starts = len(lm.encode(""))
    asked = [
        passkey.make(
            lm.tokenizer, length=args.length, depth=d, seed=seed, starts=starts
        )
        for d, seed in cells
    ]
    done = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    keys = {(r["name"], r["length"], r["sparsity"]) for r in map(json.loads, done)}
    for name, cache in caches(lm, args.length, args.sparsity, args.gates).items():
        sparsity = args.sparsity if name != "full" else 0.0
        wanted = args.only is None or name.startswith(tuple(args.only.split(",")))
        if not wanted or (name, args.length, sparsity) in keys:
            continue
        began = time.perf_counter()
        made = lm.generate([e.prompt for e in asked], passkey.NEW_TOKENS, cache=cache)
        scores = [passkey.score(e, m.text) for e, m in zip(asked, made, strict=True)]
        record = {
            "name": name,
            "cache": cache,
            "length": args.length,
            "sparsity": sparsity,
            "bytes": lm.cache_bytes(cache, args.length),
            "accuracy": sum(scores) / len(scores),
            "scores": [[*cell, s] for cell, s in zip(cells, scores, strict=True)],
            "answers": [m.text for m in made],
            "seconds": round(time.perf_counter() - began, 1),
        }
        with RESULTS.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(name, record["bytes"], record["accuracy"], record["seconds"], flush=True)


if __name__ == "__main__":
    main()
