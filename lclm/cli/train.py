"""`lclm train --config=FILE`: one run, from a config to a trained model."""

import contextlib
import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lclm.cli import options
from lclm.cli.config_file import read_config, read_mesh
from lclm.cli.workdir import check_folder, check_same, set_aside
from lclm.data.fetch import write_atomic
from lclm.errors import LclmError


def main(argv: Sequence[str]) -> int:
    """Train the run of a config file; the same command again resumes it."""
    parser = options.Parser(
        "train",
        "Train the run of a config file; the same command again goes on where it was "
        "stopped.",
        epilog="example: lclm train --config=configs/smoke.py:steps=20",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:KEY=VALUE,...]", help="the run"
    )
    parser.add_argument("--workdir", help="folder of the results (runs/NAME)")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="begin anew; an earlier folder is renamed, not removed",
    )
    parser.add_argument(
        "--until", type=options.positive, metavar="STEP", help="stop after this step"
    )
    parser.add_argument(
        "--mesh", metavar="AXIS=SIZE,...", help="in place of the config's: fsdp=8"
    )
    args = parser.parse_args(argv)
    from lclm import processes
    from lclm.train.stop import Stopped

    processes.join()
    names = ("workdir", "restart", "until", "mesh")
    try:
        run(args.config, **{name: getattr(args, name) for name in names})
    except Stopped as stop:
        again = " ".join(["lclm train", *(a for a in argv if a != "--restart")])
        print(f"lclm: {stop}; to go on: {again}", file=sys.stderr)
        return stop.status
    return 0


def run(
    config: str,
    *,
    workdir: str | Path | None = None,
    restart: bool = False,
    until: int | None = None,
    mesh: str | None = None,
    console: Console | None = None,
) -> Path:
    """Train the run of `config` and return the folder of the trained model.

    `workdir` (default `runs/<name>`) receives train.json, metrics.jsonl, events/,
    checkpoints/, loss.png, model/, and hf/ and sample.txt where asked for. An
    unfinished run of the same config that is there is resumed, a finished one only
    named; `restart` renames what is there. `until` ends this sitting after that step.
    `mesh` (`fsdp=4,context_ring=2`) stands in for that of the config.

    Raises:
      LclmError: the config, the model, the data or the folder is at fault; nothing is
        written then.
      Stopped: SIGTERM, Ctrl-C or `until`; a checkpoint is written.
    """
    from lclm import processes
    from lclm.train.config import replace, train_config

    console = console or Console(quiet=not processes.first())
    run = train_config(read_config(config))
    if mesh is not None:
        run = replace(run, mesh=read_mesh(mesh))
    folder = check_folder(Path(workdir) if workdir else Path("runs") / run.name)
    if not restart:
        check_same(folder, run)
        if (folder / "model").exists():
            console.print(
                f"[bold]{run.name}[/bold] is finished: {folder / 'model'}; "
                "--restart trains it again"
            )
            return folder / "model"
    bundle = source(run.model, seed=run.seed)
    if bundle.tokenizer is None:
        raise LclmError(
            f"{run.model.source!r} has no tokenizer: set model.tokenizer to 'bytes' or "
            "to a folder with a tokenizer.json"
        )
    return _train(run, bundle, folder, console, restart=restart, until=until)


def _train(
    run: Any,
    bundle: Any,
    folder: Path,
    console: Console,
    *,
    restart: bool,
    until: int | None,
) -> Path:
    from lclm import processes
    from lclm.train.checkpoint import Store, check_disk
    from lclm.train.layout import make_layout
    from lclm.train.loop import Trainer
    from lclm.train.records import loss_curve

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # failures are told once
    layout = make_layout(run, bundle.config)
    process = (0, 1) if layout is None else layout.share(run.batch, run.length)
    batches, holdout = _open(run, bundle, process)
    trainer = Trainer(run, bundle.config, bundle.params)

    def warn(text: str) -> None:
        console.print(f"[yellow]warning[/yellow]: {text}", highlight=False)

    place = folder / "checkpoints"
    store = Store(place, run.checkpoints, about=trainer.about(), warn=warn)
    check_disk(folder, need=trainer.disk(store))
    processes.meet("the folder is looked at")
    if restart and processes.first():
        set_aside(folder, console)
    processes.meet("the folder is free")
    done = trainer.resume(store, batches)
    if run.start_from and not done:
        trainer.begin_from(Path(run.start_from), optimizer=run.carry_optimizer)
    console.print(
        f"[bold]{run.title or run.name}[/bold]  [dim]{run.model.source}[/dim]"
        + (f"  resumed at step {done}" if done else "")
    )
    if processes.first():
        told = json.dumps(run.to_json(), indent=2) + "\n"
        write_atomic(folder / "train.json", told)
    with _bars(console, run.steps, done) as observe:
        trained = trainer.fit(
            batches, folder, observe, store=store, holdout=holdout, until=until
        )
    trained = dataclasses.replace(trained, params=processes.on_host(trained.params))
    if processes.first():
        loss_curve(folder, title=run.title or run.name)
    _export(run, trainer, trained, bundle, folder)
    target = folder / "model"
    console.print(f"trained in {trained.seconds:.0f} s: [bold]{target}[/bold]")
    if run.sample is not None:
        text = write_sample(run.sample, target, folder / "sample.txt")
        console.print(text, style="italic", markup=False, highlight=False)
    return target


def write_sample(sample: Any, model: Path, path: Path) -> str:
    """What the trained model makes of a prompt, as stored: loaded, asked, written."""
    import lclm
    from lclm import processes

    lm = lclm.load(model)
    found = lm.generate(
        sample.prompt, sample.tokens, temperature=sample.temperature, seed=0
    )
    text = sample.prompt + found.text
    if processes.first():
        write_atomic(path, text + "\n")
    return text


def _open(run: Any, bundle: Any, process: tuple[int, int]) -> tuple[Any, Any]:
    """Batches to train on, and those to look at (None without `holdout`).

    process: which part of each batch's rows to read, of how many.
    """
    from lclm.data.pipeline import open_batches

    shape = dict(batch=run.batch, length=run.length, seed=run.seed, process=process)
    tokenizer = bundle.tokenizer
    batches = open_batches(run.data, tokenizer, **shape)
    looks = run.holdout is not None and run.eval_every
    return batches, open_batches(run.holdout, tokenizer, **shape) if looks else None


def _export(run: Any, trainer: Any, trained: Any, bundle: Any, folder: Path) -> None:
    """Write model/ last: where it is, the run is finished."""
    from lclm import hub, processes
    from lclm.hub.adapter import save_adapter
    from lclm.hub.bundle import Bundle
    from lclm.train.state import final_params, reshaped, trained_params

    config = reshaped(bundle.config, run.model)
    params = final_params(run, trainer.config, trained.params)
    half, target = folder / "model.part", folder / "model"
    if processes.first():
        _keep_extra(run, trainer, trained, folder)
        for old in (half, folder / "hf") if run.hugging_face else (half,):
            shutil.rmtree(old, ignore_errors=True)
    try:
        if run.model.lora is not None:
            own = {n: trained.params[n] for n in trained.state.params}
            own = trained_params(run, trainer.config, own)
            told = dict(config=config, spec=run.model.lora, base=run.model.source)
            save_adapter(folder / "adapter", own, **told)
        made = Bundle(config, params, bundle.tokenizer, run.name)
        if run.hugging_face:
            hub.save_hf(folder / "hf", made)
        hub.save_orbax(half, made)
        if processes.first():
            half.rename(target)
        processes.meet("the model is written")
    except Exception as error:
        shutil.rmtree(half, ignore_errors=True)
        if isinstance(error, LclmError):
            raise
        raise LclmError(
            f"{target} could not be written ({error}); the run is done and in its "
            "checkpoint: free some space and give the same command again"
        ) from error


def _keep_extra(run: Any, trainer: Any, trained: Any, folder: Path) -> None:
    """Write what the objective trained for itself, if anything."""
    import numpy as np

    from lclm.learned import Extra, fingerprint, save_extra, shape
    from lclm.train.state import own_params

    own = {name: np.asarray(leaf) for name, leaf in own_params(trained.params).items()}
    if own:
        kind = run.objective.partition(":")[0]
        settings = dataclasses.asdict(trainer.stepper.objective)
        about = shape(trainer.config)
        table = trained.params["embed/table"]
        # Where it is spread over hosts, the file goes by the name of its base alone.
        here = getattr(table, "is_fully_addressable", True)
        weights = fingerprint(table) if here else ()
        save_extra(folder, Extra(kind, run.model.source, own, about, settings, weights))


def source(spec: Any, *, seed: int = 0) -> Any:
    """The model a run starts from: read, or drawn anew in a source's shape."""
    import jax

    from lclm import hub
    from lclm.hub.bundle import Bundle
    from lclm.hub.tokenizer_files import read_tokenizer
    from lclm.models.decoder import init_params
    from lclm.models.presets import PRESETS, preset

    named = spec.source in PRESETS and not Path(spec.source).exists()
    known = spec.source in hub.KNOWN
    if named and not known and not spec.scratch:
        raise LclmError(
            f"{spec.source!r} is a shape without weights: set model.scratch=True to "
            "draw them, or name a checkpoint"
        )
    if named and spec.scratch:
        config, tokenizer = preset(spec.source), None
        params = init_params(config, jax.random.key(seed))
        bundle = Bundle(config, params, tokenizer, spec.source)
    else:
        bundle = hub.load(spec.source)
        if spec.scratch:
            params = init_params(bundle.config, jax.random.key(seed))
            bundle = Bundle(bundle.config, params, bundle.tokenizer, spec.source)
    if spec.tokenizer == "model":
        return bundle
    config = bundle.config
    if spec.tokenizer == "bytes":
        tokenizer = hub.ByteTokenizer()
    else:
        tokenizer = read_tokenizer(Path(spec.tokenizer), bos=config.bos, eos=config.eos)
        if tokenizer is None:
            raise LclmError(f"model.tokenizer: no tokenizer.json in {spec.tokenizer!r}")
    if tokenizer.vocab_size > config.vocab:
        raise LclmError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{spec.source!r} {config.vocab}: take one of at most as many"
        )
    return Bundle(config, bundle.params, tokenizer, spec.source)


@contextlib.contextmanager
def _bars(console: Console, steps: int, done: int) -> Iterator[Any]:
    """A progress line: loss, speed, time left, and skipped steps in red."""
    from lclm.data import store

    store.prepare()
    with Progress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    ) as bars:
        task = bars.add_task("compiling", total=steps, completed=done)

        def observe(step: int, record: dict[str, float]) -> None:
            told = f"loss {record['loss']:.3f}  "
            told += f"{record['tokens_per_second']:,.0f} tokens/s"
            if "mfu" in record:
                told += f"  MFU {record['mfu']:.0%}"
            if record.get("skipped"):
                told += f"  [red]{record['skipped']:.0f} skipped[/red]"
            bars.update(task, completed=step, description=told)

        yield observe
