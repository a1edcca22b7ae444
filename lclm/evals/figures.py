"""Figures as PNG bytes, drawn without a display or any global state."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK = "#1f2933"
FAINT = "#8a94a0"
CURVES = ("#2563eb", "#e0592a", "#0f9d78", "#8b3fc7", "#c2881b", "#be185d", "#5b6673")
HEAT = LinearSegmentedColormap.from_list("heat", ("#F0496E", "#EBB839", "#0CD79F"))


def loss_by_position(
    curves: Mapping[str, Sequence[Sequence[float | int]]], *, trained: int = 0
) -> bytes:
    """Loss in nats by position, one curve per cache with its bootstrap interval.

    A curve is rows of start, end, nll, count, low, high; `trained` > 0 draws a line
    at the length the model was trained for.
    """
    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for i, (title, rows) in enumerate(curves.items()):
        table = np.asarray(rows, np.float64)
        middle, colour = table[:, :2].mean(axis=1), CURVES[i % len(CURVES)]
        smooth = _smooth(table[:, 2], max(1, len(table) // 40))
        axes.fill_between(middle, table[:, 4], table[:, 5], color=colour, alpha=0.10)
        axes.plot(middle, table[:, 2], color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(middle, smooth, color=colour, linewidth=2.0, label=title)
    values = np.concatenate([np.asarray(c, np.float64)[:, 2] for c in curves.values()])
    low, high = float(values.min()), float(np.quantile(values, 0.98))
    axes.set_ylim(max(0.0, low - 0.3), high + 0.25 * (high - low) + 0.3)
    axes.set_xlim(left=0)
    end = max(c[-1][1] for c in curves.values())
    if 0 < trained <= end:
        axes.axvline(trained, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.annotate(
            f" trained for {trained:,}",
            (trained, 0.985),
            xycoords=("data", "axes fraction"),
            va="top",
            color=INK,
            fontsize=9,
        )
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    _finish(axes)
    axes.legend(frameon=False, loc="upper right", fontsize=9, labelcolor=INK)
    return _png(figure)


def heatmap(
    scores: np.ndarray, *, lengths: Sequence[int], depths: Sequence[float], title: str
) -> bytes:
    """Mean score in [0, 1] by depth (rows, fractions) and length (columns, tokens).

    Red to green over the fixed range 0 to 1, so that two figures compare; a cell that
    was not measured (NaN) stays blank.
    """
    figure = Figure(figsize=(17.5, 8), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(scores, cmap=HEAT, vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{100 * d:.4g}" for d in depths])
    axes.set_xlabel("token limit", fontsize=13)
    axes.set_ylabel("depth percent", fontsize=13)
    axes.set_title(title, color=INK, fontsize=15, loc="left")
    axes.set_xticks(np.arange(1, len(lengths)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(depths)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0, labelsize=12)
    axes.spines[:].set_visible(False)
    if scores.size <= 120:
        for (row, column), value in np.ndenumerate(scores):
            if np.isfinite(value):
                axes.text(column, row, f"{value:.2g}", ha="center", va="center")
    figure.colorbar(image, ax=axes, label="score", pad=0.01)
    return _png(figure)


def score_lines(
    lines: Mapping[str, Sequence[tuple[float | int, float]]],
    *,
    across: str,
    bounds: Mapping[str, float] | None = None,
) -> bytes:
    """Scores in [0, 1] as percent over what `across` names, a line for each way.

    `bounds` are drawn as dashed levels.
    """
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for i, (title, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        colour = CURVES[i % len(CURVES)]
        percent = [100 * value for value in y]
        axes.plot(x, percent, color=colour, marker="o", linewidth=2.0, label=title)
    for title, level in (bounds or {}).items():
        axes.axhline(100 * level, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            title,
            (1.0, 100 * level),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color=INK,
            fontsize=9,
        )
    axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_ylim(-2, 104)
    axes.set_xlabel(across)
    axes.set_ylabel("score (percent)")
    _finish(axes)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return _png(figure)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving mean over at most `2 width + 1` points, shorter at the ends."""
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
