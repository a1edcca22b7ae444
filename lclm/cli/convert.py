"""`lclm convert`: read any format, write Hugging Face or lclm."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from lclm.cli import options
from lclm.errors import LclmError


def main(argv: Sequence[str]) -> None:
    """Write a model into a new folder, or write nothing."""
    parser = options.Parser(
        "convert",
        "Read a known name, HF folder, .gguf file or lclm folder; write another.",
    )
    parser.add_argument("model")
    parser.add_argument("folder", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--format", choices=("hf", "orbax"), default="hf")
    parser.add_argument(
        "--dtype", choices=options.DTYPES, help="default: as the source stores it"
    )
    parser.add_argument("--adapter", help="folder of a LoRA adapter to merge first")
    args = parser.parse_args(argv)
    out = Path(args.folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LclmError(
            f"{args.folder!r} is already there and not empty: name a new folder"
        )

    import jax.numpy as jnp

    from lclm import hub

    write = {"hf": hub.save_hf, "orbax": hub.save_orbax}[args.format]
    dtype = getattr(jnp, args.dtype) if args.dtype else None
    bundle = hub.load(args.model, dtype=dtype)
    if args.adapter:
        bundle = hub.with_adapter(bundle, args.adapter)
    out.parent.mkdir(parents=True, exist_ok=True)
    half = out.with_name(out.name + ".part")
    shutil.rmtree(half, ignore_errors=True)
    try:
        write(half, bundle)
        half.replace(out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    print(out)
