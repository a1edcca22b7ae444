"""`lclm compare`: one page over several runs, question by question."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lclm.cli import options
from lclm.cli.finished import JOURNAL, RUN, Measured, Run, read_run
from lclm.cli.job import CHOICE_KEYS, Stage
from lclm.cli.page import Page, Section
from lclm.cli.run import label, machine, show_panel
from lclm.data.fetch import write_atomic
from lclm.errors import LclmError
from lclm.evals import cost, pairs
from lclm.evals.base import Panel, Record

# Settings outside a SCOPE that the records of both sides must share: a score of a cache
# that saw the question is never set beside one of a cache that did not.
SHARED = ("questions", "keys")
# Settings that the runs' tables show together.
UNITED = ("caches", "readings", "strategies")
MACHINE = ("processor", "devices", "memory")
FACTS = ("date", *MACHINE, "lclm", "jax")


def main(argv: Sequence[str]) -> None:
    """Print the tables of several runs side by side and write their page."""
    parser = options.Parser(
        "compare",
        "Runs side by side, and each against the first on the same questions.",
        epilog="example: lclm compare full=runs/eval-passkey quest=runs/quest",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]FOLDER",
        help="folder of an `lclm run` or `lclm eval`; the first is the base",
    )
    parser.add_argument("--out", default="runs/compare", help="folder (runs/compare)")
    args = parser.parse_args(argv)
    command = shlex.join(["lclm", "compare", *argv])
    write(read_runs(args.runs), Path(args.out), command=command)


def read_runs(told: Sequence[str]) -> dict[str, Run]:
    """Runs by name: what stands before "=", else that of the folder.

    Raises:
      LclmError: fewer than two, a name twice, or a folder that is not a run's.
    """
    folders: dict[str, Path] = {}
    for text in told:
        name, equals, path = text.partition("=")
        whole = not equals or Path(text).exists()
        folder = Path(text if whole else path)
        name = folder.resolve().name if whole else name
        if not name:
            raise LclmError(f"{text!r} names nothing before '=': NAME=FOLDER")
        if name in folders:
            raise LclmError(
                f"two runs have the name {name!r} ({folders[name]} and {folder}): give "
                f"one another, for instance other={folder}"
            )
        folders[name] = folder
    if len(folders) < 2:
        raise LclmError(f"one run, {told[0]!r}, is given; compare takes at least two")
    return {name: read_run(folder) for name, folder in folders.items()}


def write(
    runs: Mapping[str, Run], out: Path, *, command: str, console: Console | None = None
) -> Path:
    """The page, figures and CSV files of a comparison in `out`; the page's path.

    Raises:
      LclmError: the runs have nothing in common, or `out` is no place for it.
    """
    if out.exists() and not out.is_dir():
        raise LclmError(f"--out {str(out)!r} is a file: name a folder")
    if (out / RUN).exists() or (out / JOURNAL).exists():
        raise LclmError(f"--out {str(out)!r} holds a run itself: name another folder")
    console = console or Console()
    common = in_common(runs)
    sections: list[Section] = []
    for task in common:
        taken = {name for s in sections for name in (*s.figures, *s.csv)}
        sections += task.sections(taken)
    sections.append(costs_of(runs))
    for section in sections:
        for panel in section.panels:
            show_panel(panel, console)
        section.write(out)
    base, *others = runs
    facts = machine()
    page = Page(
        title=" · ".join(runs),
        about=f"{', '.join(others)} against {base}.{_left_out(runs, common)}",
        sections=[_runs(runs), *sections],
        command=command,
        config=json.dumps({n: run.config for n, run in runs.items()}, indent=2),
        facts={name: facts[name] for name in ("date", "lclm", "Python")},
        kicker="lclm compare",
    )
    console.print(f"page: [bold]{out / 'report.html'}[/bold]")
    return write_atomic(out / "report.html", page.html())


@dataclass(frozen=True)
class Task:
    """One evaluation with the same settings in several runs, by the run's name."""

    measured: Mapping[str, Sequence[Measured]]

    @property
    def first(self) -> Measured:
        """The first run's."""
        return next(iter(self.measured.values()))[0]

    @property
    def evaluation(self) -> Any:
        """The first run's, with the caches, readings and strategies of all."""
        stages = [m.stage for its in self.measured.values() for m in its]
        first = stages[0].evaluation
        united = {}
        for setting in (n for n in UNITED if hasattr(first, n)):
            found: dict[str, Any] = {}
            for value in (v for s in stages for v in getattr(s.evaluation, setting)):
                found.setdefault(getattr(value, "name", value), value)
            united[setting] = tuple(found.values())
        return dataclasses.replace(first, **united)

    def records(self) -> list[Record]:
        """All records under the name of their run, and of their model where there are
        several."""
        return [
            {**r, "model": cost.reading_name((name, r.get("model", "")))}
            for name, its in self.named().items()
            for r in its
        ]

    def named(self) -> dict[str, list[Record]]:
        """Records by run."""
        return {n: [r for m in its for r in m.named()]
                for n, its in self.measured.items()}  # fmt: skip

    def pairs(self) -> list[pairs.Pairs]:
        """Every way of reading of the other runs beside its like in the first."""
        (base, its), *others = self.named().items()
        known = cost.readings(its)
        found = []
        for name, records in others:
            for way, mine in cost.readings(records).items():
                like = max(known, key=lambda w: (w[1:] == way[1:], w[0] == way[0]))
                told = (_name(base, like), known[like])
                found.append(pairs.Pairs.join(told, (_name(name, way), mine)))
        return found

    def sections(self, taken: set[str]) -> list[Section]:
        """The runs' common tables and figures, then what changed."""
        trained = min(m.trained for its in self.measured.values() for m in its)
        evaluation = self.evaluation
        summary = evaluation.summary(self.records(), trained=trained).apart(taken)
        panels = [_of_runs(panel) for panel in summary.panels]
        summary = dataclasses.replace(summary, panels=tuple(panels))
        title = self.first.stage.title or panels[0].title
        taken = {*taken, *summary.figures, *summary.tables()}
        name = f"{self.first.stage.kind}_changes.csv"
        changes = pairs.summary(self.pairs(), name).apart(taken)
        note = label(evaluation)
        return [
            Section.of(summary, title, note),
            Section.of(changes, f"{title}: what changed", note),
        ]


def in_common(runs: Mapping[str, Run]) -> list[Task]:
    """What at least two runs measured with the same settings, in the first's order.

    Raises:
      LclmError: there is nothing.
    """
    found: dict[str, dict[str, list[Measured]]] = {}
    for name, run in runs.items():
        for measured in run.stages:
            task = found.setdefault(_identity(measured.stage), {})
            task.setdefault(name, []).append(measured)
    common = [Task(its) for its in found.values() if len(its) > 1]
    if not common:
        told = "; ".join(
            f"{name}: {', '.join(m.stage.kind for m in run.stages) or 'nothing'}"
            for name, run in runs.items()
        )
        raise LclmError(
            f"no task in common ({told}): the same evaluation is needed, with the same "
            f"{_settings(runs)}; lengths, depths, caches and models may differ"
        )
    return common


def _identity(stage: Stage) -> str:
    """What two stages share when their records may be set side by side."""
    evaluation = stage.evaluation
    names = [*evaluation.SCOPE, *(n for n in SHARED if hasattr(evaluation, n))]
    settings = stage.settings()
    return json.dumps([stage.kind, {n: settings[n] for n in names}], sort_keys=True)


def _settings(runs: Mapping[str, Run]) -> str:
    """The settings that keep the evaluations of these runs apart, in words."""
    stages = [m.stage for run in runs.values() for m in run.stages]
    names = dict.fromkeys(n for s in stages for n in (*s.evaluation.SCOPE, "questions"))
    return ", ".join(names) or "settings"


def _name(run: str, way: tuple[str, str, str]) -> str:
    return cost.reading_name((run, *way))


def _of_runs(panel: Panel) -> Panel:
    """Rows are runs here, whatever a job of several models calls them."""
    first = "run" if panel.columns[0] == "model" else panel.columns[0]
    title = panel.title.replace("by model", "by run")
    columns = (first, *panel.columns[1:])
    return dataclasses.replace(panel, title=title, columns=columns)


def _runs(runs: Mapping[str, Run]) -> Section:
    """What each run is, and where and when it was made: a column for each."""
    told = [
        {
            "title": run.title,
            "models": "; ".join(_model(n, m) for n, m in run.config["models"].items()),
            **{name: run.facts.get(name, "-") for name in FACTS},
            "command": run.command,
        }
        for run in runs.values()
    ]
    rows = tuple((name, *(of[name] for of in told)) for name in told[0])
    return Section("The runs", (Panel("The runs", ("run", *runs), rows),))


def _model(name: str, choice: Mapping[str, str]) -> str:
    held = [f"{k}={choice[k]}" for k in CHOICE_KEYS if choice.get(k)]
    words = " ".join([choice["source"], *held])
    return f"{name}: {words}" if name else words


def costs_of(runs: Mapping[str, Run]) -> Section:
    """What the common tasks took in each run."""
    common = in_common(runs)
    found = [
        e for task in common for e in cost.costs(task.first.stage.name, task.records())
    ]
    note = cost.NOTE
    if len({tuple(r.facts.get(f) for f in MACHINE) for r in runs.values()}) > 1:
        note += " The runs are of different machines: their speeds do not compare."
    return Section.of(cost.summary(found, note))


def _left_out(runs: Mapping[str, Run], common: Sequence[Task]) -> str:
    """A sentence on what only one run measured."""
    shown = {id(m) for t in common for its in t.measured.values() for m in its}
    alone = [
        f"{m.stage.name} ({name})"
        for name, run in runs.items()
        for m in run.stages
        if id(m) not in shown
    ]
    return f" Only one run measured {', '.join(alone)}." if alone else ""
