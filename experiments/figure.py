"""One figure of an experiment: loss by position, a line an arm, its seeds as a band.

    python -m experiments.figure runs/architectures experiments/architectures

Reads `loss_by_position.csv` of a finished `lclm run` whose models are named "ARM SEED",
and writes `figure.png`; `claims.csv` is copied to `results.csv` beside it.
"""

import csv
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def arms(path: Path) -> dict[str, np.ndarray]:
    """Arm (with its reading, where there are several) -> [seeds, points, 2]."""
    lines = defaultdict(lambda: defaultdict(list))
    with path.open(newline="") as file:
        reader = csv.reader(file)
        next(reader)
        for name, start, end, nll, *_ in reader:
            arm = re.sub(r" \d+(?=$|,|:| \()", "", name, count=1)
            middle = (int(start) + int(end)) / 2
            lines[arm][name].append((middle, float(nll)))
    return {arm: np.asarray(list(seeds.values())) for arm, seeds in lines.items()}


def draw(found: dict[str, np.ndarray], title: str) -> Figure:
    """Means over seeds, and the range between the seeds."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for arm, points in found.items():
        at, nll = points[0, :, 0], points[:, :, 1]
        (line,) = axes.plot(at, nll.mean(axis=0), label=arm, linewidth=1.4)
        axes.fill_between(
            at, nll.min(axis=0), nll.max(axis=0), color=line.get_color(), alpha=0.2
        )
    axes.set(title=title, xlabel="position", ylabel="nats a byte")
    axes.legend(fontsize=8, ncols=2)
    return figure


def main(run: str, folder: str) -> None:
    """Write `figure.png` and `results.csv` of a finished run into `folder`."""
    source, target = Path(run), Path(folder)
    found = arms(source / "loss_by_position.csv")
    draw(found, f"{target.name}: seeds' mean and range").savefig(
        target / "figure.png", dpi=110
    )
    shutil.copy(source / "claims.csv", target / "results.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
