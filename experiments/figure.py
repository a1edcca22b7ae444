"""Losses of an experiment: a figure by position and a table, a line an arm.

    python -m experiments.figure runs/architectures experiments/architectures

Reads the losses of a finished `lclm run`. An arm is a model without the number of its
seed, with its reading where there are several; its seeds are its models and the texts
(stages) that each of them read. Writes `figure.png`, `losses.csv` (arm, length of the
text, positions, seeds, mean nats a token and its 95% t-interval), prints the table, and
copies `claims.csv` to `results.csv` beside them.
"""

import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lclm.cli.finished import Measured, read_run
from lclm.data.fetch import write_atomic
from lclm.evals.base import Record, row_name, show, to_csv
from lclm.evals.claims import Estimate

HEADER = ("arm", "length", "from", "to", "seeds", "nats", "low", "high")
SHORT = 4
"""Points; a text with fewer of them is in the table and not in the figure."""

Points = list[tuple[int, int, float, int]]
"""(from, to, nats a token, tokens) of one text, or one part of it."""
Arms = dict[str, dict[tuple[str, str], list[Points]]]
"""Arm -> seed, which is (stage, model) -> a list for each document."""


def arm_of(record: Record, readings: int) -> str:
    """The name of a record's arm."""
    model = re.sub(r" \d+$", "", record.get("model", ""))
    return row_name(model, record["title"], readings)


def read(stages: list[Measured], field: str) -> dict[int, Arms]:
    """Arms by length of the texts; field: "curve" or "segments"."""
    found: dict[int, Arms] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for stage in stages:
        losses = [r for r in stage.named() if r["task"] == "perplexity"]
        readings = len({r["title"] for r in losses})
        for record in losses:
            seed = (stage.stage.title, record.get("model", ""))
            points = [tuple(row[:4]) for row in record[field]]
            found[record["length"]][arm_of(record, readings)][seed].append(points)
    return found


def table(found: dict[int, Arms]) -> list[tuple]:
    """A line an arm and a span: the mean over seeds of their documents' mean."""
    lines = []
    for length, arms in found.items():
        for arm, seeds in arms.items():
            spans: dict[tuple[int, int], dict] = defaultdict(dict)
            for seed, documents in seeds.items():
                for parts in zip(*documents, strict=True):
                    nats = np.average(
                        [p[2] for p in parts], weights=[p[3] for p in parts]
                    )
                    spans[parts[0][:2]][seed] = float(nats)
            for (start, end), values in spans.items():
                made = Estimate(values)
                lines.append(
                    (arm, length, start, end, len(values), made.mean, *made.interval)
                )
    return lines


def draw(found: dict[int, Arms], title: str) -> Figure:
    """A panel a length: means over seeds, and the range between trained ones.

    Texts are seeds too, and how hard they are has no place in the figure.
    """
    shown = {
        n: arms for n, arms in found.items()
        if len(next(iter(next(iter(arms.values())).values()))[0]) >= SHORT
    }  # fmt: skip
    figure = Figure(figsize=(1 + 6 * len(shown), 4.2), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (length, arms) in zip(panels, shown.items(), strict=True):
        for arm, seeds in arms.items():
            points = np.asarray(
                [np.mean(documents, axis=0) for documents in seeds.values()]
            )
            at, nats = points[0, :, :2].mean(axis=1), points[:, :, 2]
            (line,) = axes.plot(at, nats.mean(axis=0), label=arm, linewidth=1.4)
            if len({stage for stage, _ in seeds}) == 1:
                low, high = nats.min(axis=0), nats.max(axis=0)
                axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2)
        axes.set(title=f"{title}, {length:,} tokens", xlabel="position")
        axes.set_ylabel("nats a token (band: trained seeds)")
        axes.legend(fontsize=8, ncols=2)
    return figure


def main(run: str, folder: str) -> None:
    """Write the files of a finished run into `folder`."""
    source, target = Path(run), Path(folder)
    stages = list(read_run(source).stages)
    lines = table(read(stages, "segments"))
    numbers = [(*line[:5], *(show(v, ".4f") for v in line[5:])) for line in lines]
    write_atomic(target / "losses.csv", to_csv(HEADER, numbers))
    for arm, _, start, end, seeds, *nats in numbers:
        print("{} | {}-{} | {} [{}, {}] ({})".format(arm, start, end, *nats, seeds))
    draw(read(stages, "curve"), target.name).savefig(target / "figure.png", dpi=110)
    shutil.copy(source / "claims.csv", target / "results.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
