"""The head map: every gate of a file by layer and kv head, as a picture and as CSV.

    python experiments/duo_gates/heads.py
    python experiments/duo_gates/heads.py runs/duo_gates/extra.safetensors

Writes heads.png and heads.csv beside this file. Gates at or above the median, the half
that `duo:sparsity=0.5` keeps full, are ringed.
"""

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from lclm.data.fetch import write_atomic
from lclm.evals.base import to_csv
from lclm.learned import FOLDER

SHIPPED = FOLDER / "smollm2-135m.duo.safetensors"


def picture(gates: np.ndarray) -> bytes:
    """[L, K] in [0, 1]: a column a layer, a row a kv head."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(gates.T, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    layers, heads = np.nonzero(gates >= np.quantile(gates, 0.5))
    axes.scatter(layers, heads, s=70, facecolors="none", edgecolors="#c8451a")
    axes.set(
        xlabel="layer",
        ylabel="kv head",
        xticks=range(0, len(gates), 2),
        yticks=range(gates.shape[1]),
        title="DuoAttention gates of SmolLM2-135M (ringed: full at sparsity 0.5)",
    )
    figure.colorbar(image, ax=axes, label="gate", pad=0.01)
    out = io.BytesIO()
    figure.savefig(out, dpi=110)
    return out.getvalue()


def main(path: str = str(SHIPPED)) -> None:
    gates = np.clip(load_file(path)["alpha"], 0, 1)
    beside = Path(__file__).with_name
    rows = [(*at, f"{gate:.4f}") for at, gate in np.ndenumerate(gates)]
    write_atomic(beside("heads.csv"), to_csv(("layer", "kv head", "gate"), rows))
    write_atomic(beside("heads.png"), picture(gates))
    by = gates.reshape(3, -1).mean(axis=1)
    print("mean gate by third of the layers:", *(f"{mean:.3f}" for mean in by))


if __name__ == "__main__":
    main(*sys.argv[1:])
