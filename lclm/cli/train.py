"""`lclm train --config=FILE`: one run, from a config to a trained model."""

import json
from collections.abc import Sequence
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
from lclm.cli.config_file import read_config
from lclm.data.fetch import write_atomic
from lclm.errors import LclmError


def main(argv: Sequence[str]) -> None:
    """Train the run of a config file; the model is left in WORKDIR/model."""
    parser = options.Parser(
        "train",
        "Train the run of a config file.",
        epilog="example: lclm train --config=configs/smoke.py:steps=20",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:KEY=VALUE,...]", help="the run"
    )
    parser.add_argument("--workdir", help="folder of the results (runs/NAME)")
    args = parser.parse_args(argv)
    run(args.config, workdir=args.workdir)


def run(
    config: str, *, workdir: str | Path | None = None, console: Console | None = None
) -> Path:
    """Train the run of `config` and return the folder of the trained model.

    `workdir` (default `runs/<name>`) receives train.json, metrics.jsonl and model/.

    Raises:
      LclmError: the config, the model or the data is at fault; nothing is written.
    """
    from lclm.data.pipeline import open_batches
    from lclm.hub.bundle import Bundle
    from lclm.train.config import train_config
    from lclm.train.loop import Trainer
    from lclm.train.state import final_params, reshaped

    console = console or Console()
    run = train_config(read_config(config))
    folder = Path(workdir) if workdir else Path("runs") / run.name
    target = folder / "model"
    if target.exists():
        raise LclmError(f"{target} exists: name another --workdir, or remove it")
    bundle = source(run.model, seed=run.seed)
    if bundle.tokenizer is None:
        raise LclmError(
            f"{run.model.source!r} has no tokenizer: set model.tokenizer to 'bytes' or "
            "to a folder with a tokenizer.json"
        )
    batches = open_batches(
        run.data, bundle.tokenizer, batch=run.batch, length=run.length, seed=run.seed
    )
    trainer = Trainer(run, bundle.config, bundle.params)
    console.print(
        f"[bold]{run.title or run.name}[/bold]  [dim]{run.model.source}[/dim]"
    )
    write_atomic(folder / "train.json", json.dumps(run.to_json(), indent=2) + "\n")
    trained = _fit(trainer, batches, folder, console)
    from lclm import hub

    config_out = reshaped(bundle.config, run.model)
    params = final_params(run, trainer.config, trained.params)
    hub.save_orbax(target, Bundle(config_out, params, bundle.tokenizer, run.name))
    console.print(f"trained in {trained.seconds:.0f} s: [bold]{target}[/bold]")
    return target


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


def _fit(trainer: Any, batches: Any, folder: Path, console: Console) -> Any:
    with Progress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
    ) as bars:
        task = bars.add_task("compiling", total=trainer.run.steps)

        def observe(step: int, record: dict[str, float]) -> None:
            rate = record["tokens_per_second"]
            told = f"loss {record['loss']:.3f}  {rate:,.0f} tokens/s"
            bars.update(task, completed=step, description=told)

        return trainer.fit(batches, folder, observe)
