"""A fact far outside the window: which placements of full attention find it.

    python experiments/longgen/needle.py

Three layers of 32 channels learn from scratch to give the value that stood behind a
key, 36 to 64 tokens back in random filler. A sparse layer sees 4 sinks and the last 8
tokens, so three of them reach 24 back; one full layer stands in the middle, at the
bottom or at the top (arXiv 2410.01485), beside three and none. Writes needle.csv (arm,
seed, recall) beside this file and prints its means.
"""

import csv
from pathlib import Path

import numpy as np

from experiments.infini.needle import recall, train
from lclm.config import AttentionSpec, LayerSpec, ModelConfig, RopeSpec, Run
from lclm.evals.claims import Estimate
from lclm.models.convert import longgen

LAYERS, SINKS, WINDOW = 3, 4, 8
LENGTH, BEHIND = 68, 28
# A fact is a key and its value, in the first BEHIND tokens; the last tokens are keys.
KEYS, VALUES, FILL = 4, 4, 8
ARMS = {
    **{place: (1, place) for place in ("middle", "bottom", "top")},
    "all full": (LAYERS, "middle"),
    "none full": (0, "bottom"),
}
STEPS, RATE = 1000, 5e-3


def facts(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts [rows, LENGTH] that end with every key, and their values [rows, KEYS]."""
    texts = KEYS + VALUES + rng.integers(0, FILL, (rows, LENGTH))
    pairs = np.tile(np.arange(SINKS // 2, BEHIND // 2), (rows, 1))
    where = 2 * rng.permuted(pairs, axis=1)[:, :KEYS]
    values = KEYS + rng.integers(0, VALUES, (rows, KEYS))
    asked = rng.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)
    at = np.arange(rows)[:, None]
    texts[at, where], texts[at, where + 1] = np.arange(KEYS), values
    texts[:, -KEYS:] = asked
    return texts.astype(np.int32), values[at, asked].astype(np.int32)


def model(full: int, place: str) -> ModelConfig:
    """Attention alone, `full` layers of it without a window."""
    layer = LayerSpec(AttentionSpec(4, 2, 16, RopeSpec(context=128)), None)
    stack = (Run((layer,), LAYERS),)
    plain = ModelConfig("learner", KEYS + VALUES + FILL, 32, stack, 128)
    return longgen(full, SINKS, WINDOW, place)(plain)


def main(seeds: int = 3) -> None:
    """Train, ask, write."""
    rows = []
    for arm, told in ARMS.items():
        for seed in range(seeds):
            lm = train(
                model(*told), facts, steps=STEPS, rate=RATE, scale=True, seed=seed
            )
            rows.append((arm, seed, recall(lm, facts, rows=256)))
            print(*rows[-1], flush=True)
    with (Path(__file__).parent / "needle.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("arm", "seed", "recall"), *rows])
    for arm in ARMS:
        print(arm, Estimate({s: r for a, s, r in rows if a == arm}).show())


if __name__ == "__main__":
    main()
