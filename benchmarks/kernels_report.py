"""A table and a figure of what `benchmarks.kernels` measured.

python -m benchmarks.kernels_report benchmarks/results/kernels-DEVICE.json
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

SIZE = re.compile(r"([\d,]+)(?!.*\d)")  # the last number of a case's name: its tokens


def table(record: dict[str, Any]) -> str:
    """Milliseconds (minima) by case and implementation, and the floor."""
    names = list(dict.fromkeys(n for c in record["cases"] for n in c["results"]))
    heads = ["case", *names, "floor"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(names) + 1) + "|"]
    for case in record["cases"]:
        cells = [
            cell(case["results"].get(name, {}), case.get("floor_ms")) for name in names
        ]
        floor = case.get("floor_ms")
        end = "-" if floor is None else f"{floor:.3f} ({case['bound_by']})"
        lines.append("| " + " | ".join([case["case"], *cells, end]) + " |")
    told = (record.get(k) for k in ("device", "clocks", "date", "versions", "command"))
    facts = ", ".join(str(x) for x in told if x)
    note = "milliseconds, minima of one interleaved run; times over the floor in ()"
    return "\n".join([facts, "", note, "", *lines, ""])


def cell(result: dict[str, Any], floor: float | None) -> str:
    """One number, "failed" for an error, "-" where nothing was asked."""
    if "error" in result:
        return "failed"
    if not result:
        return "-"
    ms = result["min_ms"]
    return f"{ms:.3f}" + (f" ({ms / floor:.2f})" if floor else "")


def series(record: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By operation and implementation: (tokens, milliseconds) by size."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for case in record["cases"]:
        size = SIZE.search(re.sub(r" x [\d,]+$", "", case["case"]))
        if size is None:
            continue
        kind = case["case"][: size.start()].strip(" x").strip()
        for name, result in case["results"].items():
            if "error" not in result:
                point = int(size[1].replace(",", "")), result["min_ms"]
                found.setdefault(kind, {}).setdefault(name, []).append(point)
    return found


def figure(record: dict[str, Any], path: Path) -> None:
    """A panel an operation: time by length."""
    from matplotlib.figure import Figure

    panels = series(record)
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    drawn = Figure(figsize=(4 * across, 3 * down), layout="constrained")
    grid = drawn.subplots(down, across, squeeze=False).ravel()
    for axes, (kind, lines) in zip(grid, panels.items(), strict=False):
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(title=kind, xlabel="tokens", ylabel="ms")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(fontsize=7)
    for axes in grid[len(panels) :]:
        axes.remove()
    drawn.savefig(path, dpi=100)


def write(path: Path) -> None:
    """FILE.md and FILE.png beside FILE.json."""
    record = json.loads(path.read_text())
    if record["cases"]:
        path.with_suffix(".md").write_text(table(record))
        figure(record, path.with_suffix(".png"))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
