"""`lclm data`: the tokens that runs are trained on, and files to evaluate with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from lclm.cli import options
from lclm.cli.config_file import read_config
from lclm.errors import LclmError

if TYPE_CHECKING:
    from lclm.data.pipeline import DataSpec
    from lclm.data.rows import Documents

COMMANDS = {
    "build": "tokenise the sources and keep the tokens",
    "list": "tokens that are kept",
    "show": "rows of the mixture as text",
    "stats": "documents, tokens and rows of every part",
    "longbench_mini": "write real data in LongBench's format",
}
LENGTH = 1024


@dataclass(frozen=True)
class Job:
    """What a command line asks for: data, a tokenizer, and a row length."""

    spec: "DataSpec"
    tokenizer: Any
    length: int
    seed: int
    rows: int | None


def main(argv: Sequence[str]) -> None:
    """Build, list, show or count tokenised data."""
    parser = options.Parser(
        "data",
        "Documents into tokens: " + "; ".join(f"{k}: {v}" for k, v in COMMANDS.items()),
        epilog="example: lclm data build --source=kjv_books --tokenizer=smollm2-135m",
    )
    parser.add_argument("command", choices=tuple(COMMANDS))
    parser.add_argument("--config", metavar="FILE.py[:KEY=VALUE,...]", help="a run")
    parser.add_argument("--source", action="append", default=[], help="repeatable")
    parser.add_argument(
        "--tokenizer", help="bytes, a model, or a folder with a tokenizer.json"
    )
    parser.add_argument("--folder", help="where tokens are kept, or files written")
    parser.add_argument("--length", type=options.positive, help="tokens a row")
    parser.add_argument("--rows", type=options.positive, default=2, help="for show")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--skip", action="store_true", help="leave undecodable documents out"
    )
    parser.add_argument(
        "--clean", action="store_true", help="with list: remove unfinished builds"
    )
    mini = parser.add_argument_group("longbench_mini")
    mini.add_argument(
        "--examples", type=options.positive, help="a dataset (100 in all)"
    )
    mini.add_argument(
        "--words", type=options.positive, default=3000, help="longest context (3000)"
    )
    mini.add_argument("--qmsum", default="", help="a jsonl file of QMSum")
    args = parser.parse_args(argv)
    console = Console()
    if args.command == "list":
        _list(console, args.folder or "", clean=args.clean)
        return
    if args.command == "longbench_mini":
        _mini(args, console)
        return
    if bool(args.config) == bool(args.source):
        parser.error("give either --config=FILE.py or --source=NAME:KEY=VALUE,...")
    job = _job(args)
    opened = _open(job, console)
    if args.command == "build":
        _built(job, opened, console)
    elif args.command == "stats":
        _stats(job, opened, console)
    else:
        _show(job, args.rows, console)


def _mini(args: Any, console: Console) -> None:
    from lclm.data import longbench_mini

    folder = Path(args.folder or "longbench-mini")
    written = longbench_mini.write(
        folder,
        examples=args.examples or 0,
        words=args.words,
        seed=args.seed,
        qmsum=args.qmsum,
    )
    table = Table("dataset", Column("examples", justify="right"))
    for name, count in written.items():
        table.add_row(name, str(count))
    console.print(table)
    console.print(f"lclm eval longbench MODEL folder={folder}", markup=False)


def find_tokenizer(name: str) -> Any:
    """The tokenizer of a model, or of a folder with a tokenizer.json; or bytes.

    No weights are read.
    """
    from lclm import hub
    from lclm.hub.gguf_file import GgufFile
    from lclm.hub.gguf_vocab import gguf_tokenizer
    from lclm.hub.tokenizer_files import read_tokenizer

    if name == "bytes":
        return hub.ByteTokenizer()
    path = Path(name)
    if path.is_dir() and not any((path / f).is_file() for f in _MODEL_FILES):
        found = read_tokenizer(path, bos=None, eos=())
    else:
        path = hub.pull(name) if name in hub.KNOWN and not path.exists() else path
        if path.is_file():
            found = gguf_tokenizer(GgufFile(path))
        else:
            config = hub.describe(name)
            found = read_tokenizer(path, bos=config.bos, eos=config.eos)
    if found is None:
        raise LclmError(
            f"{name!r} has no tokenizer: give --tokenizer=bytes, or a model or folder "
            "with a tokenizer.json"
        )
    return found


_MODEL_FILES = ("config.json", "lclm.json")


def _job(args: Any) -> Job:
    from lclm.config import from_dict
    from lclm.data.pipeline import DataSpec

    if args.config:
        config = read_config(args.config)
        data = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        if "data" not in data:
            raise LclmError(f"{args.config} has no `data`: it is not a config of a run")
        given, model = data["data"], data.get("model") or {}
        name = model.get("tokenizer", "model")
        name = args.tokenizer or (model.get("source") if name == "model" else name)
        length, seed = data.get("length", LENGTH), data.get("seed", 0)
        rows = data["steps"] * data["batch"] if "steps" in data else None
    else:
        given = {"mixture": [{"source": source} for source in args.source]}
        name, length, seed, rows = args.tokenizer, LENGTH, args.seed, None
    if args.folder:
        given = {**given, "folder": args.folder}
    if args.skip:
        given = {**given, "undecodable": "skip"}
    if not name:
        raise LclmError("whose tokens? give --tokenizer=bytes, a model, or a folder")
    spec = from_dict(DataSpec, given, "data.")
    tokenizer = find_tokenizer(name)
    return Job(spec, tokenizer, args.length or length, seed, rows)


def _open(job: Job, console: Console) -> list["Documents"]:
    """The tokens of every part, tokenised under a progress line where they must be."""
    from lclm.data import store
    from lclm.data.pipeline import open_documents

    store.prepare()
    opened = []
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
        console=console,
    ) as bars:
        for part in job.spec.parts:
            task = bars.add_task(escape(part.source), total=1, told="")

            def observe(so_far: Any, task: Any = task) -> None:
                told = f"{so_far.documents:,} documents  {so_far.tokens:,} tokens"
                bars.update(task, told=told)

            opened.append(open_documents(job.spec, part.source, job.tokenizer, observe))
            lengths = opened[-1].lengths
            told = f"{len(lengths):,} documents  {int(lengths.sum()):,} tokens"
            bars.update(task, completed=1, told=told)
    return opened


def _built(job: Job, opened: list["Documents"], console: Console) -> None:
    source = Column("source", overflow="fold")
    table = Table(source, "documents", "characters", "tokens", "skipped", "folder")
    skipped: list[str] = []
    for part, documents in zip(job.spec.parts, opened, strict=True):
        told = getattr(documents, "summary", None)
        tokens = f"{int(documents.lengths.sum()):,}"
        if told is None:
            table.add_row(escape(part.source), "1", "", tokens, "", "in memory")
            continue
        table.add_row(
            escape(part.source),
            f"{told.documents:,}",
            f"{told.characters:,}",
            tokens,
            str(told.skipped),
            documents.path.name,
        )
        skipped += told.named
    console.print(table)
    for name in skipped:
        console.print(f"skipped {name}", markup=False)


def _list(console: Console, folder: str, *, clean: bool) -> None:
    from lclm.data.store import list_stores, remove_unfinished, stores_folder

    if clean:
        console.print(f"removed {remove_unfinished(folder)} unfinished")
    source = Column("source", overflow="fold")
    table = Table(source, "documents", "tokens", "tokenizer", "bytes", "folder")
    for path, told in list_stores(folder).items():
        size = sum(f.stat().st_size for f in path.iterdir())
        table.add_row(
            escape(told.source),
            f"{told.documents:,}",
            f"{told.tokens:,}",
            told.tokenizer,
            f"{size:,}",
            path.name,
        )
    console.print(f"in {stores_folder(folder)}", markup=False)
    console.print(table)


def _stats(job: Job, opened: list["Documents"], console: Console) -> None:
    from lclm.data.pipeline import held_out, rows_of

    spec, length = job.spec, job.length
    held = held_out(spec, opened)
    total = sum(part.share for part in spec.parts)
    headings = [
        Column("source", overflow="fold"),
        "share",
        "documents",
        "held out",
        "tokens",
        "median",
    ]
    headings += ["longest", f">= {length:,}", "rows", "filled"]
    table = Table(*headings, *(["epochs"] if job.rows else []))
    for part, documents in zip(spec.parts, opened, strict=True):
        if part.share == 0:
            continue
        sizes = documents.lengths
        rows = rows_of(spec, part, documents, length=length, seed=job.seed, held=held)
        share = part.share / total
        cells = [
            escape(part.source),
            f"{share:.1%}",
            f"{len(sizes):,}",
            f"{int(np.isin(documents.hashes, held).sum()):,}",
            f"{int(sizes.sum()):,}",
            f"{int(np.median(sizes)):,}",
            f"{int(sizes.max()):,}",
            f"{sizes[sizes >= length].sum() / sizes.sum():.1%}",
        ]
        if not hasattr(rows, "plan"):  # made up as they are asked for
            table.add_row(*cells, "endless", "100.0%")
            continue
        cells += [f"{len(rows):,}", f"{rows.plan.fill:.1%}"]
        if job.rows:
            cells.append(f"{share * job.rows / len(rows):.2f}")
        table.add_row(*cells)
    console.print(table)
    console.print(f"rows of {length:,} tokens, {spec.packing}")


def _show(job: Job, count: int, console: Console) -> None:
    from lclm.data.pipeline import open_batches

    stream = open_batches(
        job.spec, job.tokenizer, batch=1, length=job.length, seed=job.seed
    )
    for row in range(count):
        batch = {key: array[0] for key, array in next(stream).items()}
        size = len(batch["tokens"])
        console.rule(f"row {row}: {size:,} tokens")
        for segment in range(1, int(batch["segments"].max()) + 1):
            own = batch["segments"] == segment
            predicted = int(batch["weights"][own].sum())
            text = job.tokenizer.decode(batch["tokens"][own].tolist(), special=True)
            told = f"document {segment}: {int(own.sum()):,} tokens, {predicted:,} "
            console.print(f"[bold]{told}predicted[/bold]")
            console.print(text, markup=False, highlight=False)
        padding = int((batch["segments"] == 0).sum())
        if padding:
            console.print(f"[dim]{padding:,} tokens of padding[/dim]")
