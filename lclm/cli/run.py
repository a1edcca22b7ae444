"""`lclm run --config=FILE`: one job, from a config to a report, resumable."""

import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table as RichTable

from lclm.cli import options, trained
from lclm.cli.finished import Measured, run_of
from lclm.cli.job import Choice, Job, Stage, read_job, scope
from lclm.cli.page import PROSE, Page, Section
from lclm.cli.training_stage import TrainingStage, run_training
from lclm.data.fetch import write_atomic
from lclm.errors import LclmError
from lclm.evals import claims, cost
from lclm.evals.base import Journal, Panel, Record

Load = Callable[..., Any]
SEEN = "query-aware"
SMOKE = "CPU-sized run: smoke."


def main(argv: Sequence[str]) -> None:
    """Run a job; the same command again goes on where an interrupt stopped it."""
    parser = options.Parser(
        "run",
        "Run the job of a config file and write its report.",
        epilog="example: lclm run --config=configs/demo.py:length=16384",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:KEY=VALUE,...]", help="the job"
    )
    parser.add_argument("--workdir", help="folder of the results (runs/NAME)")
    args = parser.parse_args(argv)
    run(args.config, workdir=args.workdir)


def run(
    config: str,
    *,
    workdir: str | Path | None = None,
    load: Load | None = None,
    console: Console | None = None,
) -> Path:
    """Run the job of `config` and return its report's path.

    `workdir` (default `runs/<name>`) receives metrics.jsonl, run.json, figures, CSV
    files and report.html. Finished measurements of an interrupted run are kept and not
    made again. `load` makes the model (`lclm.load` unless given).

    Raises:
      LclmError: the config, the model or a text is at fault; nothing is written.
    """
    job = read_job(config)
    folder = Path(workdir) if workdir else Path("runs") / job.name
    run_job(job, folder, f"lclm run --config={config}", load=load, console=console)
    return folder / "report.html"


def run_job(
    job: Job,
    folder: Path,
    command: str,
    *,
    load: Load | None = None,
    console: Console | None = None,
) -> None:
    """Stage by stage, every model through each; the report is whole after each stage.

    `command` is what the report says makes it again.
    """
    if folder.exists() and not folder.is_dir():
        raise LclmError(f"workdir {str(folder)!r} is a file: name a folder")
    console = console or Console()
    held = Held(load or options.load_model, console)
    console.print(f"[bold]{job.title or job.name}[/bold]")
    untrained = [
        c for c in job.models.values() if not c.train and trained.MODELS not in c.source
    ]
    if untrained and any(isinstance(s, Stage) for s in job.stages):
        held(untrained[0])
    done: list[Measured] = []
    decided: list[Section] = []
    try:
        models, sections = trained.train_all(job.models, folder / "models", console)
        for section in sections:
            section.write(folder)
        for stage in job.stages:
            if isinstance(stage, TrainingStage):
                section = run_training(stage, folder / "train", console)
            else:
                done.append(_run_stage(stage, models, held, folder, console))
                taken = {name for s in sections for name in (*s.figures, *s.csv)}
                section = show_stage(done[-1], taken)
            for panel in section.panels:
                show_panel(panel, console)
            sections.append(section)
            decided, costs = _decided(job, done), _cost(done)
            for part in (*decided, section, *costs):
                part.write(folder)
            _write_report(job, [*decided, *sections, *costs], folder, command)
            run_of(job, command, machine(), done).write(folder)
    except KeyboardInterrupt:
        console.print(
            f"[yellow]stopped[/yellow]: finished records are kept in "
            f"{folder / 'metrics.jsonl'}; the same command goes on from there"
        )
        raise
    for section in decided:
        show_panel(section.panels[0], console)
    console.print(f"report: [bold]{folder / 'report.html'}[/bold]")


class Held:
    """The model in use: loaded when another one is asked for, one at a time."""

    def __init__(self, load: Load, console: Console):
        self._load, self._console = load, console
        self._choice: Choice | None = None
        self._lm: Any = None

    def __call__(self, choice: Choice) -> Any:
        """The model of `choice`."""
        if choice != self._choice:
            self._choice = self._lm = None
            words = " ".join([choice.source, *choice.options().values()])
            self._console.print(f"[dim]{words}[/dim]")
            with self._console.status(f"loading {words}"):
                self._lm = self._load(choice.source, **choice.options())
            self._choice = choice
            if self._lm.tokenizer is None:
                raise LclmError(
                    f"{choice.source!r} has no tokenizer, and every stage reads text: "
                    "put its tokenizer.json beside the weights"
                )
        return self._lm


def _run_stage(
    stage: Stage, models: dict[str, Choice], held: Held, folder: Path, console: Console
) -> Measured:
    """One evaluation of every model, in the order of the job."""
    version = _version("lclm")
    records: dict[str, list[Record]] = {}
    contexts = []
    for name, choice in models.items():
        lm = held(choice)
        contexts.append(int(getattr(getattr(lm, "config", None), "context", 0)))
        scoped = scope(choice, stage, version=version)
        journal = Journal(folder / "metrics.jsonl", scope=scoped)
        if kept := len(journal.records):
            console.print(f"[dim]{kept} finished records found and kept[/dim]")
        records[name] = _measure(stage, lm, journal, console, name)
    return Measured(stage, records, min(contexts))


def show_stage(measured: Measured, taken: Collection[str]) -> Section:
    """Tables and figures of a stage; its files have names that are not `taken`."""
    evaluation = measured.stage.evaluation
    summary = evaluation.summary(measured.named(), trained=measured.trained)
    return Section.of(summary.apart(taken), measured.stage.title, label(evaluation))


def label(evaluation: Any) -> str:
    """The warning that scores are those of caches that saw the question."""
    return SEEN if getattr(evaluation, "questions", "") == "seen" else ""


def _cost(done: Sequence[Measured]) -> list[Section]:
    """What every stage took, where there is one to tell of."""
    found = [
        entry
        for measured in done
        for entry in cost.costs(measured.stage.name, measured.named())
    ]
    return [Section.of(cost.summary(found))] if found else []


def _decided(job: Job, done: Sequence[Measured]) -> list[Section]:
    """The claims whose stages are all done, where there are such."""
    records = [{**r, "stage": m.stage.name} for m in done for r in m.named()]
    names = [s.name for s in job.stages if isinstance(s, Stage)]
    ready = set(names[: len(done)]) - set(names[len(done) :])
    found = [claims.decide(c, records) for c in job.claims if ready >= set(c.stage)]
    note = SMOKE if job.size == "smoke" else ""
    return [Section.of(claims.summary(found, note=note))] if found else []


def _measure(
    stage: Stage, lm: Any, journal: Journal, console: Console, name: str = ""
) -> list[Record]:
    """Records of one model, measured or found, with a bar for each thing measured."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as bars:
        tasks: dict[str, Any] = {}

        def observe(label: str, done: int, total: int) -> None:
            if label not in tasks:
                told = f"{name}: {label}" if name else label
                tasks[label] = bars.add_task(told, total=total)
            bars.update(tasks[label], completed=done, total=total)

        return stage.evaluation.run(lm, journal=journal, observe=observe)


def show_panel(panel: Panel, console: Console) -> None:
    """A table; where that is wider than the terminal, a paragraph for each row."""
    table = to_rich(panel)
    boundless = console.options.update(width=sys.maxsize)
    if Measurement.get(console, boundless, table).minimum <= console.width:
        console.print(table)
        return
    console.print(f"[bold]{escape(panel.title)}[/bold]")
    for first, *cells in panel.rows:
        console.print(f"\n[bold]{escape(first)}[/bold]")
        for name, cell in zip(panel.columns[1:], cells, strict=True):
            told = Padding(f"[dim]{escape(name)}:[/dim] {escape(cell)}", (0, 0, 0, 2))
            console.print(told)
    if panel.note:
        console.print(f"\n[italic]{escape(panel.note)}[/italic]")


def to_rich(panel: Panel) -> RichTable:
    """The panel as a terminal table: first column left, the rest right.

    Narrow enough for 80 columns: headings and remarks in brackets take their own line,
    and no word of the first column is broken.
    """
    table = RichTable(title=panel.title, caption=panel.note or None, title_style="bold")
    first = " ".join([panel.columns[0], *(row[0] for row in panel.rows)])
    table.add_column(
        panel.columns[0], overflow="fold", min_width=max(map(len, first.split()))
    )
    for column in panel.columns[1:]:
        table.add_column(
            column.replace(" ", "\n"),
            justify="right",
            overflow="fold",
            no_wrap=column not in PROSE,
        )
    for row in panel.rows:
        cells = zip(panel.columns[1:], row[1:], strict=True)
        table.add_row(
            row[0], *(c if n in PROSE else c.replace(" (", "\n(") for n, c in cells)
        )
    return table


def _write_report(
    job: Job, sections: list[Section], folder: Path, command: str
) -> None:
    page = Page(
        title=job.title or job.name,
        about=job.about,
        sections=tuple(sections),
        command=command,
        config=job.to_json(),
        facts=machine(),
    )
    write_atomic(folder / "report.html", page.html())


def machine() -> dict[str, str]:
    """Versions, processor, memory, devices and the date, for the report."""
    import jax

    devices = jax.devices()
    facts = {
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "processor": f"{_processor()}, {_cores()} cores",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    }
    if memory := _memory():
        facts["memory"] = f"{memory / 2**30:.1f} GiB"
    for package in ("lclm", "jax", "jaxlib", "flax", "numpy"):
        facts[package] = _version(package)
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0
