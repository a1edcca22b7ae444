"""`lclm plan`: what a model and its cache will take, before anything is allocated."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lclm.cli import options

if TYPE_CHECKING:
    from lclm.config import ModelConfig

SIZES = {"float32": 4, "bfloat16": 2}


def main(argv: Sequence[str]) -> None:
    """Print bytes of weights, caches and recurrent states, by policy and length."""
    about = "Bytes of weights, caches and states; or a train step compiled for a pod."
    parser = options.Parser("plan", about)
    parser.add_argument("source", nargs="?", help="the same as --model")
    parser.add_argument(
        "--model", help="preset, known name, HF folder, .gguf, lclm folder"
    )
    parser.add_argument("--dtype", choices=options.DTYPES, default="bfloat16")
    parser.add_argument(
        "--cache", action="append", metavar="NAME:KEY=VALUE,...", help="repeatable"
    )
    parser.add_argument(
        "--context", "--lengths", type=options.lengths, default="8k,32k,128k"
    )
    parser.add_argument("--batch", type=options.positive, default=1)
    parser.add_argument(
        "--config", metavar="FILE.py[:KEY=VALUE,...]", help="a training run"
    )
    parser.add_argument(
        "--topology", help="compile its step for these devices: v5e:16x16, h200:8"
    )
    parser.add_argument(
        "--mesh", metavar="AXIS=SIZE,...", help="in place of the config's: fsdp=8"
    )
    args = parser.parse_args(argv)
    if (args.config is None) != (args.topology is None):
        parser.error("--config and --topology go together: the run, and its devices")
    if args.config is not None:
        from lclm.cli.pod import plan_run

        return plan_run(args.config, args.topology, mesh=args.mesh)
    if args.mesh is not None:
        parser.error("--mesh is that of a --config")
    if (args.source is None) == (args.model is None):
        parser.error("name one model: `lclm plan jamba-v0.1`")

    import jax.numpy as jnp
    from rich.console import Console
    from rich.table import Table

    from lclm import cache
    from lclm.blocks.layer import state_sizes
    from lclm.cache.base import fit
    from lclm.serve.memory import available_bytes, format_bytes

    policies = [cache.make(text) for text in args.cache or ["full"]]
    config, dtype = describe(args.model or args.source), getattr(jnp, args.dtype)
    weights = parameters(config) * SIZES[args.dtype]
    free = available_bytes()
    print(f"{parameters(config):,} parameters, {args.dtype}: {format_bytes(weights)}")
    print(f"available: {format_bytes(free)}" if free else "available: not known")
    table = Table("cache", *(f"{args.batch} x {n:,}" for n in args.context))
    state = 0
    for text, policy in zip(args.cache or ["full"], policies, strict=True):
        row = []
        for length in args.context:
            made, _ = fit(policy, config, dtype, length)
            kept, state = state_sizes(config, made, args.batch, length, dtype)
            fits = free is None or weights + kept + state <= free
            row.append(format_bytes(kept) + ("" if fits else " (does not fit)"))
        table.add_row(text, *row)
    Console().print(table)
    print(f"recurrent state at any length: {format_bytes(state)}")


def parameters(config: "ModelConfig") -> int:
    """How many numbers the weights of a model are."""
    from lclm.hub.names import param_shapes

    return sum(math.prod(shape) for shape in param_shapes(config).values())


def describe(source: str) -> "ModelConfig":
    """The model description of a source; a GGUF file gives it without its weights."""
    from lclm import hub
    from lclm.hub.gguf_file import GgufFile
    from lclm.hub.gguf_import import gguf_config
    from lclm.models.presets import PRESETS, preset

    path = Path(source)
    if source in PRESETS and not path.exists():
        return preset(source)
    if source in hub.KNOWN and not path.exists():
        path = hub.pull(source)
    return gguf_config(GgufFile(path)) if path.is_file() else hub.load(source).config
