"""The gates of trained Infini-attention models: the memory's share of every head.

    python experiments/infini/gates.py runs/infini

Writes `experiments/infini/gates.csv` (model, layer, head, share) and prints how many
heads are past 0.9 and below 0.1; they begin at 0.5.
"""

import csv
import sys
from pathlib import Path

import numpy as np

from lclm import hub


def shares(folder: Path) -> np.ndarray:
    """sigmoid(gate) of every layer and head of one trained model."""
    params = hub.load(str(folder / "model")).params
    layers = [params[f"layers_{i}"]["infini"]["gate"]
              for i in range(sum(n.startswith("layers_") for n in params))]  # fmt: skip
    return 1 / (1 + np.exp(-np.asarray(layers, np.float64)))


def main(run: str) -> None:
    """Every model of the run whose name begins with `infini`."""
    found = {p.name: shares(p) for p in sorted(Path(run).glob("models/infini-*"))}
    lines = [
        (name, layer, head, f"{share:.4f}")
        for name, all_ in found.items()
        for (layer, head), share in np.ndenumerate(all_)
    ]
    with (Path(__file__).parent / "gates.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("model", "layer", "head", "share"), *lines])
    for name, all_ in found.items():
        print(
            f"{name}: {all_.size} heads, {all_.min():.3f} to {all_.max():.3f}, "
            f"{(all_ > 0.9).sum()} above 0.9, {(all_ < 0.1).sum()} below 0.1"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
