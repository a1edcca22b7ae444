"""Figures as data: a PNG and a CSV file of each lie in the run, its page draws it anew.

Nothing here needs a display or any global state.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lclm.evals.base import to_csv

INK = "#1f2933"
FAINT = "#8a94a0"
CURVES = ("#2563eb", "#c8451a", "#0b7a5e", "#8b3fc7", "#946300", "#be185d", "#5b6673")
HEAT = LinearSegmentedColormap.from_list("heat", ("#F0496E", "#EBB839", "#0CD79F"))
DENSE = 40  # points of a curve above which a moving mean is drawn over it


@dataclass(frozen=True)
class Chart:
    """Curves over one axis: rows of x, y, and the interval around y (low, high).

    limits: the least and the greatest y shown. levels: dashed lines across, by name.
    marks: dashed lines up, by name.
    """

    title: str
    lines: Mapping[str, Float[np.ndarray, "_ 4"]]
    across: str
    up: str
    limits: tuple[float, float]
    levels: Mapping[str, float] = field(default_factory=dict)
    marks: Mapping[str, float] = field(default_factory=dict)

    @property
    def span(self) -> tuple[float, float]:
        """The least and the greatest x."""
        ends = [x for rows in self.lines.values() for x in rows[[0, -1], 0]]
        low, high = float(min(ends)), float(max(ends))
        return (low, high) if low < high else (low - 0.5, high + 0.5)

    def png(self) -> bytes:
        """The chart as a picture on white."""
        figure = Figure(figsize=(10.5, 5.2), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, rows) in enumerate(self.lines.items()):
            x, y, low, high = rows.T
            style = dict(color=CURVES[i % len(CURVES)], linewidth=2.0, label=name)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.10)
            if len(rows) > DENSE:
                axes.plot(x, y, color=style["color"], alpha=0.25, linewidth=0.8)
                axes.plot(x, smooth(y), **style)
            else:
                axes.plot(x, y, marker="o", markersize=4, **style)
        dashes = dict(color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        words = dict(color=INK, fontsize=9)
        for name, level in self.levels.items():
            axes.axhline(level, **dashes)
            at = dict(xycoords=("axes fraction", "data"), ha="right", va="bottom")
            axes.annotate(name, (1.0, level), **at, **words)
        for name, mark in self.marks.items():
            axes.axvline(mark, **dashes)
            at = dict(xycoords=("data", "axes fraction"), va="top")
            axes.annotate(f" {name}", (mark, 0.985), **at, **words)
        known = sorted({x for rows in self.lines.values() for x in rows[:, 0]})
        if len(known) <= 12:
            axes.set_xticks(known)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set(xlabel=self.across, ylabel=self.up, ylim=self.limits)
        _finish(axes)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        return _png(figure)

    def csv(self) -> str:
        """Every point: line, x, y, low, high."""
        rows = [(n, *row) for n, of in self.lines.items() for row in of.tolist()]
        return to_csv(("line", "x", "y", "low", "high"), rows)


@dataclass(frozen=True)
class Heatmap:
    """Mean score in [0, 1] by depth (rows, fractions) and length (columns, tokens).

    Red to green over the fixed range 0 to 1, so that two figures compare; a cell that
    was not measured (NaN) stays blank.
    """

    title: str
    scores: Float[np.ndarray, "depths lengths"]
    lengths: Sequence[int]
    depths: Sequence[float]

    def png(self) -> bytes:
        """The grid as a picture on white."""
        figure = Figure(figsize=(17.5, 8), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(self.scores, cmap=HEAT, vmin=0.0, vmax=1.0, aspect="auto")
        lengths, depths = range(len(self.lengths)), range(len(self.depths))
        axes.set_xticks(lengths, [f"{n:,}" for n in self.lengths], rotation=45)
        axes.set_yticks(depths, [f"{100 * d:.4g}" for d in self.depths])
        axes.set_xlabel("token limit", fontsize=13)
        axes.set_ylabel("depth percent", fontsize=13)
        axes.set_title(self.title, color=INK, fontsize=15, loc="left")
        axes.set_xticks(np.arange(1, len(lengths)) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, len(depths)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="both", length=0, labelsize=12)
        axes.spines[:].set_visible(False)
        if self.scores.size <= 120:
            for (row, column), value in np.ndenumerate(self.scores):
                if np.isfinite(value):
                    axes.text(column, row, f"{value:.2g}", ha="center", va="center")
        figure.colorbar(image, ax=axes, label="score", pad=0.01)
        return _png(figure)

    def csv(self) -> str:
        """Every measured cell: length, depth, score."""
        rows = [
            (self.lengths[column], self.depths[row], value)
            for (row, column), value in np.ndenumerate(self.scores)
            if np.isfinite(value)
        ]
        return to_csv(("length", "depth", "score"), rows)


def loss_by_position(
    curves: Mapping[str, Sequence[Sequence[float | int]]], *, trained: int = 0
) -> Chart:
    """Loss in nats by position, one curve per cache with its bootstrap interval.

    A curve is rows of start, end, nll, count, low, high; `trained` > 0 draws a line
    at the length the model was trained for.
    """
    tables = {n: np.asarray(rows, np.float64) for n, rows in curves.items()}
    lines = {
        name: np.column_stack([table[:, :2].mean(axis=1), table[:, [2, 4, 5]]])
        for name, table in tables.items()
    }
    values = np.concatenate([table[:, 2] for table in tables.values()])
    low, high = float(values.min()), float(np.quantile(values, 0.98))
    end = max(table[-1, 1] for table in tables.values())
    marks = {f"trained for {trained:,}": float(trained)} if 0 < trained <= end else {}
    return Chart(
        "Loss by position",
        lines,
        "position in the text (tokens)",
        "loss (nats per token)",
        (max(0.0, low - 0.3), high + 0.25 * (high - low) + 0.3),
        marks=marks,
    )


def heatmap(
    scores: Float[np.ndarray, "depths lengths"],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    title: str,
) -> Heatmap:
    """Mean score by depth and length."""
    return Heatmap(title, scores, lengths, depths)


def score_lines(
    lines: Mapping[str, Sequence[tuple[float | int, float]]],
    *,
    across: str,
    bounds: Mapping[str, float] | None = None,
) -> Chart:
    """Scores in [0, 1] as percent over what `across` names, a line for each way.

    `bounds` are drawn as dashed levels.
    """
    tables = {n: np.asarray(points, np.float64) for n, points in lines.items()}
    percent = {n: np.column_stack([t[:, 0], 100 * t[:, [1, 1, 1]]])
               for n, t in tables.items()}  # fmt: skip
    levels = {name: 100 * level for name, level in (bounds or {}).items()}
    title = f"Score by {across}"
    return Chart(title, percent, across, "score (percent)", (-2.0, 104.0), levels)


def smooth(values: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    """Centred moving mean over a twentieth of the points, less at the ends."""
    width = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), width)
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _finish(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color="#e4e8ec", linewidth=0.8)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
