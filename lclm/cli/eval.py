"""`lclm eval`: one evaluation on one model, resumable."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lclm.cli import options
from lclm.errors import LclmError


def main(argv: Sequence[str]) -> None:
    """Run an evaluation, print its tables, keep its records and figures."""
    parser = options.Parser(
        "eval",
        "Run one evaluation; the same command again continues where it stopped.",
        epilog="example: lclm eval passkey smollm2-135m 'lengths=[512]' trials=3",
    )
    parser.add_argument("name", help="an evaluation that `lclm list evals` prints")
    options.model_options(parser)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="its options")
    parser.add_argument("--out", help="folder (default runs/eval-NAME)")
    args = parser.parse_args(argv)

    from lclm import __version__
    from lclm.cli.job import Job, Stage
    from lclm.config import from_dict
    from lclm.evals import EVALS
    from lclm.evals.base import Journal

    evaluation = from_dict(EVALS[args.name], settings(args.settings))
    lm = options.load(args)
    out = Path(args.out or f"runs/eval-{args.name}")
    stage = Stage(args.name, evaluation)
    held = " ".join(filter(None, (args.dtype, args.packed, args.quantize)))
    job = Job(args.name, args.model, (stage,), held)
    scope = job.scope(stage, version=__version__)
    with Progress() as observe:
        journal = Journal(out / "metrics.jsonl", scope=scope)
        records = evaluation.run(lm, journal=journal, observe=observe)
    show(evaluation.summary(records, trained=lm.config.context), out)


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`["trials=3", "a.b=x"]` -> `{"trials": 3, "a": {"b": "x"}}`; values are JSON."""
    tree: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise LclmError(f"{pair!r} is not key=value, for example trials=3")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise LclmError(f"{pair!r}: {name} was already given as {node!r}")
        node[leaf] = value
    return tree


class Progress:
    """An observer that draws one bar per thing being measured."""

    def __enter__(self):
        from rich.progress import Progress as Bars

        self._bars = Bars(transient=True)
        self._tasks: dict[str, Any] = {}
        self._bars.start()
        return self

    def __exit__(self, *_):
        self._bars.stop()

    def __call__(self, label: str, done: int, total: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)


def show(summary, out: Path) -> None:
    """Print the tables; write figures and CSV files into `out`."""
    from rich.console import Console

    from lclm.cli.run import to_rich
    from lclm.data.fetch import write_atomic

    console = Console()
    for panel in summary.panels:
        console.print(to_rich(panel))
    for name, data in {**summary.figures, **summary.csv}.items():
        write_atomic(out / name, data)
    print(f"records, figures and tables: {out}")
