"""A comparison as JSON, as a Markdown table and as a figure."""

import json
from pathlib import Path
from typing import Any

COLOURS = {
    "lclm int8": "#0b2540",
    "lclm bf16": "#1f4e79",
    "lclm fp32": "#6fa8dc",
    "PyTorch bf16": "#b45f06",
    "PyTorch fp32": "#f6b26b",
    "llama.cpp": "#38761d",
}


def write(record: dict[str, Any], out: Path) -> None:
    """Write `out`.json, .md and .png, and print the table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = table(record)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(text)
    figure(record, out.with_suffix(".png"))
    print(text)


def names(record: dict[str, Any]) -> list[str]:
    """Every peer that has a result, in a fixed order."""
    found = {n for case in record["cases"] for n in case["results"]}
    return [n for n in COLOURS if n in found] + sorted(found - COLOURS.keys())


def table(record: dict[str, Any]) -> str:
    """Tokens a second, medians, and the ratios that matter."""
    peers = names(record)
    lines = [
        f"{record['model']}, {record['date']}, {record['cpu']}, "
        f"{record['threads']} threads. Tokens per second: median (best) of one "
        "interleaved run.",
        "",
        "| case | " + " | ".join(peers) + " | ours / best PyTorch | ours / llama.cpp |",
        "|---" * (len(peers) + 3) + "|",
    ]
    for case in record["cases"]:
        results = case["results"]
        cells = [
            f"{results[p]['median']:,.1f} ({results[p]['best']:,.1f})"
            if p in results
            else "-"
            for p in peers
        ]
        shares = [best(results, "lclm", "PyTorch"), best(results, "lclm", "llama.cpp")]
        lines.append("| " + " | ".join([case["title"], *cells, *shares]) + " |")
    lines += ["", "Peak resident memory, MiB:", ""]
    lines += ["| case | " + " | ".join(peers) + " |", "|---" * (len(peers) + 1) + "|"]
    for case in record["cases"]:
        sizes = [
            f"{case['results'][p]['peak_rss'] / 2**20:,.0f}"
            if p in case["results"]
            else "-"
            for p in peers
        ]
        lines.append("| " + " | ".join([case["title"], *sizes]) + " |")
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    lines += ["", f"Versions: Python {record['python']}, {versions}."]
    lines += ["", f"Command: `{record['command']}`", ""]
    return "\n".join(lines)


def best(results: dict[str, Any], ours: str, theirs: str) -> str:
    """The better precision of ours over the better of theirs."""
    a = [r["median"] for n, r in results.items() if n.startswith(ours)]
    b = [r["median"] for n, r in results.items() if n.startswith(theirs)]
    return f"{max(a) / max(b):.2f}x" if a and b else "-"


def figure(record: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second for each case, one panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = record["cases"]
    columns = min(4, len(cases))
    rows = -(-len(cases) // columns)
    size = (3.2 * columns, 2.6 * rows)
    chart, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        found = [n for n in names(record) if n in case["results"]]
        speeds = [case["results"][n]["median"] for n in found]
        bars = axis.barh(found, speeds, color=[COLOURS.get(n, "grey") for n in found])
        axis.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7)
        axis.set_title(case["title"], fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    chart.suptitle(f"tokens per second, {record['cpu']}", fontsize=9)
    chart.tight_layout()
    chart.savefig(path, dpi=130)
    pyplot.close(chart)
