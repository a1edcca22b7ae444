"""Tables and a figure of what `benchmarks.caches` measured.

    python -m benchmarks.caches_report

Reads benchmarks/results/caches_{quality,tasks,speed,memory}*.json, what is there,
and writes benchmarks/results/caches.md and caches.png.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
SIDES = (("lclm", "chunk"), ("lclm", "end"), ("kvpress", "end"))
TASKS = ("passkey", "needle", "recall")


def memory(data: Row) -> list[str]:
    """Peaks by policy, in MiB and as a share of the budget's cache."""
    rows = [
        (
            f"`{r['cache']}`",
            f"{r['cache_bytes'] / 2**20:,.1f}",
            f"{r['first_peak'] / 2**20:,.0f}",
            f"{r['long_peak'] / 2**20:,.0f}",
            f"{r['share']:.2f}",
            f"{r['share_reading']:.2f}",
        )
        for r in data["rows"]
    ]
    heads = ("cache", "its MiB", "peak of the short text", "of the long one", "share")
    return markdown((*heads, "share, reading alone"), rows)


def speed(data: Row) -> list[str]:
    """Tokens read and written a second, and each side over kvpress."""
    rows = []
    for row in data["rows"]:
        beside = [
            r
            for r in data["rows"]
            if same(r, row, "method", "budget") and r["library"] == "kvpress"
        ]
        cells = [row["method"], row["library"]]
        for key in ("read", "write"):
            if "error" in row:
                cells += ["-", "-"]
                continue
            over = f"{row[key] / beside[0][key]:.2f}" if beside else "-"
            cells += [f"{row[key]:,.1f}", over]
        peak = row.get("peak_above_short")
        cells.append("-" if peak is None else f"{peak / 2**20:,.0f}")
        rows.append(tuple(cells))
    rates = ("read, tokens/s", "over kvpress", "written, tokens/s", "over kvpress")
    return markdown(("method", "by", *rates, "MiB above a short text"), rows)


def quality(data: Row) -> list[str]:
    """Loss behind the cut, by method, budget and side."""
    return by_side(data, lambda r: f"{r['nll']:.3f}")


def tasks(data: Row) -> list[str]:
    """Passkeys, needles and facts found."""

    def found(row: Row) -> str:
        its = [next(v for k, v in row.items() if k.startswith(t)) for t in TASKS]
        return " + ".join(f"{v:.0f}" for v in its)

    return by_side(data, found)


def by_side(data: Row, show: Callable[[Row], str]) -> list[str]:
    """A line a method and budget, a column a side."""
    lines: dict[tuple, Row] = {}
    for row in data["rows"]:
        cells = lines.setdefault((row["method"], row["budget"]), {})
        at = "chunk" if row["at"] == "full" else row["at"]
        cells[row["library"], at] = "-" if "error" in row else show(row)
        if "cache_bytes" in row:
            cells.setdefault("bytes", f"{row['cache_bytes'] / 2**20:,.1f}")
    rows = [
        (
            method,
            "all" if budget is None else f"{budget:,}",
            cells.get("bytes", "-"),
            *(cells.get(side, "-") for side in SIDES),
        )
        for (method, budget), cells in lines.items()
    ]
    heads = ("method", "budget", "MiB", "lclm, at=chunk", "lclm, at=end", "kvpress")
    return markdown(heads, rows)


def same(a: Row, b: Row, *keys: str) -> bool:
    """Whether two rows agree in some columns."""
    return all(a[key] == b[key] for key in keys)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its first column to the left."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows)]


def figure(data: Row, path: Path) -> None:
    """Loss by budget: a panel a side, a line a method."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 3.6), layout="constrained")
    panels = drawn.subplots(1, len(SIDES), sharey=True)
    rows = [r for r in data["rows"] if "nll" in r]
    (whole,) = [r["nll"] for r in rows if r["method"] == "full"]
    for axes, (library, at) in zip(panels, SIDES, strict=True):
        mine = [r for r in rows if (r["library"], r["at"]) == (library, at)]
        for method in dict.fromkeys(r["method"] for r in mine):
            points = [(r["budget"], r["nll"]) for r in mine if r["method"] == method]
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=method)
        axes.axhline(whole, color="0.5", linestyle=":", label="whole")
        axes.set_title(f"{library}, at={at}")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("budget, tokens a kv head")
        axes.legend(fontsize=7)
    panels[0].set_ylabel("nats a token behind the cut")
    drawn.savefig(path, dpi=110)


def main() -> None:
    """Write caches.md and caches.png."""
    lines = []
    for kind in (quality, tasks, speed, memory):
        whole = f"caches_{kind.__name__}.json"
        for path in sorted(RESULTS.glob(f"caches_{kind.__name__}*.json")):
            data = json.loads(path.read_text())
            facts = {k: v for k, v in data.items() if k != "rows"}
            told = ", ".join(f"{k} {v}" for k, v in facts.items())
            lines += [f"## {kind.__name__.capitalize()}", "", told, ""]
            lines += [*kind(data), ""]
            if kind is quality and path.name == whole:
                figure(data, RESULTS / "caches.png")
    text = "\n".join(lines)
    (RESULTS / "caches.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
