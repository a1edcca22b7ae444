"""One self-contained HTML page from a run: tables, figures inside, how it was made."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lclm.evals.base import Panel

STYLE = """
:root { --ink:#1f2933; --soft:#5b6673; --line:#e3e7eb; --back:#f6f7f9; --mark:#2563eb; }
* { box-sizing: border-box; }
body { margin:0; background:var(--back); color:var(--ink); line-height:1.55;
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,sans-serif; }
main { max-width:1020px; margin:0 auto; padding:56px 24px 72px; }
header { margin-bottom:36px; }
.kicker { color:var(--mark); font-weight:600; letter-spacing:.06em; font-size:13px;
  text-transform:uppercase; }
h1 { font-size:34px; line-height:1.15; margin:6px 0 12px; letter-spacing:-.02em; }
header p { color:var(--soft); font-size:18px; max-width:46em; margin:0; }
section { background:#fff; border:1px solid var(--line); border-radius:12px;
  padding:26px 30px 28px; margin:0 0 22px; }
h2 { font-size:21px; margin:0 0 14px; letter-spacing:-.01em; }
h3 { font-size:15px; margin:24px 0 8px; color:var(--soft); }
.wide { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:14.5px; }
th { text-align:right; font-weight:600; color:var(--soft); padding:8px 10px;
  border-bottom:2px solid var(--line); vertical-align:bottom; }
td { text-align:right; padding:9px 10px; border-bottom:1px solid var(--line);
  font-variant-numeric:tabular-nums; }
th:first-child, td:first-child { text-align:left; padding-left:0; }
td:first-child { font-weight:550; }
tr:last-child td { border-bottom:0; }
.note { color:var(--soft); font-size:13.5px; margin:12px 0 0; }
figure { margin:22px 0 0; } figure img { width:100%; height:auto; display:block; }
pre { background:var(--back); border-radius:8px; padding:14px 16px; margin:0;
  overflow-x:auto; font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; }
dl { display:grid; grid-template-columns:max-content 1fr; gap:6px 22px; margin:0;
  font-size:14.5px; } dt { color:var(--soft); } dd { margin:0; }
details summary { cursor:pointer; color:var(--mark); margin-top:18px; }
details pre { margin-top:10px; }
@media print { body { background:#fff; } section { break-inside:avoid; } }
"""


@dataclass(frozen=True)
class Section:
    """One stage of the run: its tables, then its figures by file name."""

    title: str
    panels: Sequence[Panel]
    figures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """Everything the report says; `facts` are versions, hardware, dates."""

    title: str
    about: str
    sections: Sequence[Section]
    command: str
    config: str
    facts: Mapping[str, str]

    def html(self) -> str:
        """The whole page; it loads nothing from anywhere."""
        title = html.escape(self.title)
        facts = "".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>"
            for k, v in self.facts.items()
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title} · lclm</title><style>{STYLE}</style></head>\n"
            f'<body><main><header><div class="kicker">lclm run</div><h1>{title}</h1>'
            f"<p>{html.escape(self.about)}</p></header>\n"
            + "".join(_section(s) for s in self.sections)
            + "<section><h2>How this was made</h2>"
            f"<pre>{html.escape(self.command)}</pre><h3>Machine and versions</h3>"
            f"<dl>{facts}</dl><details><summary>Configuration</summary>"
            f"<pre>{html.escape(self.config)}</pre></details></section>"
            "</main></body></html>\n"
        )


def _section(section: Section) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2>"]
    for number, panel in enumerate(section.panels):
        if number or panel.title != section.title:
            parts.append(f"<h3>{html.escape(panel.title)}</h3>")
        parts.append(_table(panel))
    for name, png in section.figures.items():
        data = base64.b64encode(png).decode()
        parts.append(
            f'<figure><img alt="{html.escape(name)}" '
            f'src="data:image/png;base64,{data}"></figure>'
        )
    return "".join(parts) + "</section>\n"


def _table(panel: Panel) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in panel.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
        for row in panel.rows
    )
    note = f'<p class="note">{html.escape(panel.note)}</p>' if panel.note else ""
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )
