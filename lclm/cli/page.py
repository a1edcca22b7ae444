"""One self-contained HTML page: tables, figures and their numbers, how it was made."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lclm.cli import drawing
from lclm.data.fetch import write_atomic
from lclm.evals.base import Figure, Panel, Summary, csv_name

# Columns of prose: wrapped where they must be; every other cell is a number or a name.
PROSE = ("model said", "wanted", "found")
LONG = 28  # characters of a cell that make its column one of prose on a page
# What the page may load: nothing but what is written in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Section:
    """One stage of the run: tables, figures by file name, their numbers as CSV.

    label: a word of warning beside the title.
    """

    title: str
    panels: Sequence[Panel]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    csv: Mapping[str, str] = field(default_factory=dict)
    label: str = ""

    @classmethod
    def of(cls, summary: Summary, title: str = "", label: str = "") -> "Section":
        """All that a summary has, under the title of its first table unless told."""
        title = title or summary.panels[0].title
        return cls(title, summary.panels, summary.figures, summary.tables(), label)

    def write(self, folder: Path) -> None:
        """Leave every figure as a picture, and every CSV file, in `folder`."""
        for name, figure in self.figures.items():
            write_atomic(folder / name, figure.png())
        for name, text in self.csv.items():
            write_atomic(folder / name, text)


@dataclass(frozen=True)
class Page:
    """Everything a page says; `facts` are versions, hardware, dates."""

    title: str
    about: str
    sections: Sequence[Section]
    command: str
    config: str
    facts: Mapping[str, str]
    kicker: str = "lclm run"

    def html(self) -> str:
        """The whole page; it loads nothing from anywhere."""
        title = html.escape(self.title)
        facts = "".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>"
            for k, v in self.facts.items()
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<link rel="icon" href="data:,">'
            f"<title>{title} · lclm</title><style>{STYLE.read_text()}</style></head>\n"
            f'<body><main><header><div class="kicker">{html.escape(self.kicker)}</div>'
            f"<h1>{title}</h1><p>{html.escape(self.about)}</p></header>\n"
            + "".join(_section(s) for s in self.sections)
            + '<section><h2>How this was made</h2><pre tabindex="0">'
            f"{html.escape(self.command)}</pre><h3>Machine and versions</h3>"
            f"<dl>{facts}</dl><details><summary>Configuration</summary>"
            f'<pre tabindex="0">{html.escape(self.config)}</pre></details></section>'
            "</main></body></html>\n"
        )


def _section(section: Section) -> str:
    label = f' <span class="label">{html.escape(section.label)}</span>'
    title = html.escape(section.title) + (label if section.label else "")
    parts = [f"<section><h2>{title}</h2>"]
    for number, panel in enumerate(section.panels):
        if number or panel.title != section.title:
            parts.append(f"<h3>{html.escape(panel.title)}</h3>")
        parts.append(_table(panel))
    drawn = [
        drawing.draw(figure, link=_link(csv_name(name), section.csv[csv_name(name)]))
        for name, figure in section.figures.items()
    ]
    if drawn:
        parts.append(f'<div class="figures">{"".join(drawn)}</div>')
    beside = {csv_name(name) for name in section.figures}
    links = [_link(n, text) for n, text in section.csv.items() if n not in beside]
    if links:
        parts.append(f'<p class="note">The numbers: {", ".join(links)}</p>')
    return "".join(parts) + "</section>\n"


def _link(name: str, text: str) -> str:
    """A file to download that the page carries inside."""
    data = base64.b64encode(text.encode()).decode()
    shown = html.escape(name)
    return f' <a download="{shown}" href="data:text/csv;base64,{data}">{shown}</a>'


def _table(panel: Panel) -> str:
    kinds = ["", *(_kind(n, cells) for n, *cells in zip(panel.columns[1:],
             *(row[1:] for row in panel.rows), strict=True))]  # fmt: skip
    head = "".join(
        f'<th scope="col"{kind}>{html.escape(name)}</th>'
        for kind, name in zip(kinds, panel.columns, strict=True)
    )
    rows = "".join(f"<tr>{_row(row, kinds)}</tr>" for row in panel.rows)
    note = f'<p class="note">{html.escape(panel.note)}</p>' if panel.note else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return drawing.scroll(table, panel.title) + note


def _kind(name: str, cells: Sequence[str]) -> str:
    prose = name in PROSE or any(len(cell) > LONG for cell in cells)
    return ' class="prose"' if prose else ""


def _row(row: Sequence[str], kinds: Sequence[str]) -> str:
    """Cells of one row; its name may break behind the signs of a policy's options."""
    name = re.sub(r"([:_]|,(?!\d))", r"\1<wbr>", html.escape(row[0]))
    cells = "".join(
        f"<td{kind}>{html.escape(cell)}</td>"
        for kind, cell in zip(kinds[1:], row[1:], strict=True)
    )
    return f'<th scope="row">{name}</th>{cells}'
