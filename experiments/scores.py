"""One figure of an experiment: the score of every cache, its seeds as points.

    python -m experiments.scores runs/locret-1024 experiments/locret_heads

Reads the records of a finished `lclm run` that asks passkeys or needles, writes
`figure.png` and `scores.csv` (task, cache, seed, mean score of the seed's questions,
questions, bytes held), and copies `claims.csv` to `results.csv` beside them.
"""

import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lclm.cli.finished import read_run
from lclm.data.fetch import write_atomic
from lclm.evals.base import to_csv

TASKS = ("passkey", "needle")
Rows = list[tuple[str, str, int, float, int, int]]


def scores(folder: Path) -> Rows:
    """(task, cache, seed, mean score, questions, bytes), in the order of the run."""
    found: dict[tuple[str, str, int], list[dict]] = defaultdict(list)
    for record in (r for stage in read_run(folder).stages for r in stage.named()):
        if record["task"] in TASKS:
            found[record["task"], record["cache"], record["seed"]].append(record)
    return [
        (*key, sum(r["score"] for r in its) / len(its), len(its), its[0]["cache_bytes"])
        for key, its in found.items()
    ]


def draw(rows: Rows, title: str) -> Figure:
    """A panel a task, a line a cache: a point for each seed, a bar at their mean."""
    tasks = list(dict.fromkeys(task for task, *_ in rows))
    caches = list(dict.fromkeys(cache for _, cache, *_ in rows))
    figure = Figure(
        figsize=(3 + 5 * len(tasks), 0.42 * len(caches) + 1.2), layout="constrained"
    )
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        mine = [row[1:] for row in rows if row[0] == task]
        for at, cache in enumerate(caches):
            line(axes, at, [row[1:] for row in mine if row[0] == cache])
        axes.set(xlim=(0, 1.25), title=f"{title}: {task}s", xticks=[0, 0.5, 1])
        axes.set_xlabel("found (bar: mean; points: seeds)")
    panels[0].set_yticks(range(len(caches)), caches, fontsize=8)
    panels[0].invert_yaxis()
    return figure


def line(axes: Any, at: int, rows: list[tuple[int, float, int, int]]) -> None:
    """One cache of one task at height `at`."""
    found = [score for _, score, *_ in rows]
    axes.barh(at, sum(found) / len(found), color="#2563eb", alpha=0.25)
    spread = [at + 0.18 * (i - (len(found) - 1) / 2) for i in range(len(found))]
    axes.plot(found, spread, "o", color="#2563eb", markersize=4)
    axes.text(1.03, at, f"{rows[0][-1] / 1e6:.1f} MB", va="center", fontsize=8)


def main(run: str, folder: str) -> None:
    """Write `figure.png`, `scores.csv` and `results.csv` of a run into `folder`."""
    source, target = Path(run), Path(folder)
    rows = scores(source)
    columns = ("task", "cache", "seed", "score", "questions", "bytes")
    told = [(*key, f"{m:.4f}", n, size) for *key, m, n, size in rows]
    write_atomic(target / "scores.csv", to_csv(columns, told))
    draw(rows, target.name).savefig(target / "figure.png", dpi=110)
    if (source / "claims.csv").exists():
        shutil.copy(source / "claims.csv", target / "results.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
