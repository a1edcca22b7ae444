"""One figure of an experiment: the score of every cache, its seeds as points.

    python -m experiments.scores runs/locret-1024 experiments/locret_heads

Reads `metrics.jsonl` of a finished `lclm run` that asks passkeys, writes `figure.png`
and `scores.csv` (cache, seed, mean score of the seed's keys, keys, bytes held), and
copies `claims.csv` to `results.csv` beside them.
"""

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from lclm.data.fetch import write_atomic
from lclm.evals.base import to_csv

Rows = list[tuple[str, int, float, int, int]]


def scores(path: Path) -> Rows:
    """(cache, seed, mean score, keys, bytes), caches in the order they were asked."""
    found: dict[tuple[str, int], list[dict]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["task"] == "passkey":
            found[record["cache"], record["seed"]].append(record)
    return [
        (*key, sum(r["score"] for r in its) / len(its), len(its), its[0]["cache_bytes"])
        for key, its in found.items()
    ]


def draw(rows: Rows, title: str) -> Figure:
    """A line a cache: a point for each seed, a bar at their mean."""
    caches = list(dict.fromkeys(cache for cache, *_ in rows))
    figure = Figure(figsize=(9, 0.42 * len(caches) + 1.2), layout="constrained")
    axes = figure.subplots()
    for at, cache in enumerate(caches):
        mine = [score for name, _, score, *_ in rows if name == cache]
        (held, *_) = (size for name, *_, size in rows if name == cache)
        axes.barh(at, sum(mine) / len(mine), color="#2563eb", alpha=0.25)
        spread = [at + 0.18 * (i - (len(mine) - 1) / 2) for i in range(len(mine))]
        axes.plot(mine, spread, "o", color="#2563eb", markersize=4)
        axes.text(1.03, at, f"{held / 1e6:.1f} MB", va="center", fontsize=8)
    axes.set_yticks(range(len(caches)), caches, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.18), title=title, xlabel="found (bar: mean; points: seeds)")
    return figure


def main(run: str, folder: str) -> None:
    """Write `figure.png`, `scores.csv` and `results.csv` of a run into `folder`."""
    source, target = Path(run), Path(folder)
    rows = scores(source / "metrics.jsonl")
    columns = ("cache", "seed", "score", "keys", "bytes")
    told = [(c, s, f"{m:.4f}", n, size) for c, s, m, n, size in rows]
    write_atomic(target / "scores.csv", to_csv(columns, told))
    draw(rows, f"{target.name}: passkeys").savefig(target / "figure.png", dpi=110)
    if (source / "claims.csv").exists():
        shutil.copy(source / "claims.csv", target / "results.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
