"""Figures in HTML: a heatmap is a table, a chart is SVG under labels that stay text.

The curves stretch with the page while strokes and words keep their size, so a phone
shows the same figure without a script.
"""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from lclm.evals.base import Figure
from lclm.evals.figures import CURVES, DENSE, HEAT, Chart, Heatmap, smooth

SIZE = 1000  # units of the drawing along x and along y
NEAREST = 0.13  # of the width between two labels


def draw(figure: Figure, *, link: str = "") -> str:
    """The figure with its caption; `link` follows the caption's words."""
    body, kind = (
        (_heatmap(figure), "map")
        if isinstance(figure, Heatmap)
        else (_chart(figure), "chart")
    )
    title = html.escape(figure.title)
    return (
        f'<figure class="{kind}"><figcaption>{title}{link}</figcaption>{body}</figure>'
    )


def scroll(inside: str, name: str) -> str:
    """A box of its own for what may be wider than the page; the keyboard reaches it."""
    label = html.escape(name)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}">'
        f"{inside}</div>"
    )


def colour(index: int) -> str:
    """The style that gives a curve its colour."""
    return f"--c:var(--c{index % len(CURVES)})"


def _heatmap(figure: Heatmap) -> str:
    head = "".join(f'<th scope="col">{n:,}</th>' for n in figure.lengths)
    rows = "".join(
        f'<tr><th scope="row">{100 * depth:.4g}%</th>'
        + "".join(_cell(v) for v in values)
        + "</tr>"
        for depth, values in zip(figure.depths, figure.scores, strict=True)
    )
    table = (
        f'<table class="heat"><thead><tr><th scope="col">depth \\&nbsp;tokens</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table>"
    )
    return scroll(table, figure.title)


def _cell(value: float) -> str:
    if not math.isfinite(value):
        return '<td aria-label="not measured"></td>'
    back = to_hex(HEAT(min(max(value, 0.0), 1.0)))
    return f'<td style="background:{back}">{value:.2g}</td>'


def _chart(figure: Chart) -> str:
    x_low, x_high = figure.span
    low, high = figure.limits

    def x(values):
        return (np.asarray(values, np.float64) - x_low) / (x_high - x_low)

    def y(values):
        return np.clip((np.asarray(values, np.float64) - low) / (high - low), 0, 1)

    across = {t: x(t) for t in _across(figure)}
    up = {t: y(t) for t in _ticks(low, high)}
    marks = {f"{n}": float(x(at)) for n, at in figure.marks.items()}
    levels = {f"{n}": float(y(at)) for n, at in figure.levels.items()}
    drawn = "".join(
        f'<path class="grid" d="M0 {_at(1 - v)}H{SIZE}"/>' for v in up.values()
    )
    drawn += "".join(f'<path class="rule" d="M{_at(v)} 0V{SIZE}"/>'
                     for v in marks.values())  # fmt: skip
    drawn += "".join(f'<path class="rule" d="M0 {_at(1 - v)}H{SIZE}"/>'
                     for v in levels.values())  # fmt: skip
    for i, rows in enumerate(figure.lines.values()):
        drawn += _curve(i, x(rows[:, 0]), y(rows[:, 1:]), y(smooth(rows[:, 1])))
    labels = "".join(
        f'<span class="x" style="left:{100 * v:.2f}%">{t:,.10g}</span>'
        for t, v in _apart(across).items()
    )
    labels += "".join(
        f'<span class="y" style="bottom:{100 * v:.2f}%">{t:,.4g}</span>'
        for t, v in up.items()
    )
    labels += "".join(
        f'<span class="level" style="bottom:{100 * v:.2f}%">{html.escape(n)}</span>'
        for n, v in levels.items()
    )
    labels += "".join(
        f'<span class="mark{" left" * (v > 0.6)}" style="left:{100 * v:.2f}%">'
        f"{html.escape(n)}</span>"
        for n, v in marks.items()
    )
    return (
        f'{_legend(figure.lines)}<div class="axis">{html.escape(figure.up)}</div>'
        f'<div class="plot" role="img" aria-label="{html.escape(_words(figure))}">'
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" '
        f'aria-hidden="true">{drawn}</svg>{labels}</div>'
        f'<div class="axis across">{html.escape(figure.across)}</div>'
    )


def _curve(index: int, x: np.ndarray, y: np.ndarray, calm: np.ndarray) -> str:
    """Band, then points or (where they are many) a faint line under the moving mean."""
    dash = " dash" if index >= len(CURVES) else ""
    middle, low, high = y.T
    parts = []
    if (high > low).any():
        edge = [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]
        parts.append(f'<path class="band" d="{_path(edge)}Z"/>')
    line = list(zip(x, middle, strict=True))
    if len(line) > DENSE:
        parts.append(f'<path class="raw" d="{_path(line)}"/>')
        line = list(zip(x, calm, strict=True))
    else:
        dots = "".join(f"M{_at(a)} {_at(1 - b)}h0" for a, b in line)
        parts.append(f'<path class="dots" d="{dots}"/>')
    parts.append(f'<path class="line{dash}" d="{_path(line)}"/>')
    return f'<g style="{colour(index)}">{"".join(parts)}</g>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_at(a)} {_at(1 - b)}" for a, b in points)


def _at(share: float) -> str:
    return f"{SIZE * share:.1f}".removesuffix(".0")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, about five."""
    found = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(t) for t in found if low <= t <= high]


def _across(figure: Chart) -> list[float]:
    """Every x where they are few, else round ones."""
    known = sorted({float(v) for rows in figure.lines.values() for v in rows[:, 0]})
    return known if len(known) <= 12 else _ticks(*figure.span)


def _apart(ticks: Mapping[float, float]) -> dict[float, float]:
    """Labels that do not touch on a phone, the last one among them."""
    kept: dict[float, float] = {}
    for tick, at in reversed(ticks.items()):
        if all(other - at >= NEAREST for other in kept.values()):
            kept[tick] = at
    return kept


def _legend(lines: Mapping[str, np.ndarray]) -> str:
    items = "".join(
        f'<li style="{colour(i)}"><svg viewBox="0 0 22 6" aria-hidden="true"><path '
        f'class="line{" dash" * (i >= len(CURVES))}" d="M0 3H22"/></svg>'
        f"{html.escape(name)}</li>"
        for i, name in enumerate(lines)
    )
    return f'<ul class="legend">{items}</ul>'


def _words(figure: Chart) -> str:
    """The chart for who does not see it: every curve from its first to its last."""
    told = [
        f"{name}: {rows[0, 1]:.4g} at {rows[0, 0]:,.10g}, "
        f"{rows[-1, 1]:.4g} at {rows[-1, 0]:,.10g}"
        for name, rows in figure.lines.items()
    ]
    return f"{figure.title}, {figure.up} by {figure.across}. {'; '.join(told)}"
