"""Options that several commands share, and errors in lclm's own form."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from lclm.errors import LclmError

if TYPE_CHECKING:
    from lclm.language_model import LanguageModel

DTYPES = ("float32", "bfloat16")


class Parser(argparse.ArgumentParser):
    """argparse that raises `LclmError` instead of printing its usage and leaving."""

    def __init__(self, command: str, about: str, **options: Any):
        super().__init__(
            prog=f"lclm {command}", description=about, allow_abbrev=False, **options
        )

    def error(self, message: str) -> NoReturn:
        raise LclmError(f"{message}; `{self.prog} --help` lists what it takes")


def model_options(parser: Parser) -> None:
    """MODEL and how its weights are held."""
    parser.add_argument("model", help="known name, HF folder, .gguf, lclm folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--packed", choices=("int8", "int4"), help="keep GGUF weights packed"
    )
    parser.add_argument(
        "--quantize", choices=("int8",), help="round matrices: fastest on a CPU"
    )
    parser.add_argument("--adapter", help="folder of a LoRA adapter of this model")
    parser.add_argument(
        "--rope", metavar="KIND:KEY=VALUE,...", help="yarn:factor=4, linear:factor=4"
    )


def cache_options(
    parser: Parser, default: str | None = "full", shown: str = ""
) -> None:
    """Cache policy and prefill chunk; `shown` says what no default stands for."""
    parser.add_argument(
        "--cache",
        default=default,
        metavar="NAME:KEY=VALUE,...",
        help=f"cache policy ({default or shown})",
    )
    parser.add_argument(
        "--chunk", type=positive, default=512, help="tokens per prefill step"
    )


def sampling_options(parser: Parser) -> None:
    """How the next token is drawn; greedy by default."""
    parser.add_argument("-n", "--max-new-tokens", type=positive, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=positive)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop", action="append", default=[], help="end before this text; repeatable"
    )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `generate` from `sampling_options`."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
    return {name: getattr(args, name) for name in names}


def load(args: argparse.Namespace) -> "LanguageModel":
    """The model that `model_options` names."""
    names = ("dtype", "packed", "quantize", "adapter", "rope")
    return load_model(args.model, **{name: getattr(args, name) for name in names})


def load_model(source: str, **held: Any) -> "LanguageModel":
    """`lclm.load`, imported when it is needed."""
    import lclm

    return lclm.load(source, **held)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return value


def lengths(text: str) -> list[int]:
    """`512,2k,32k` -> [512, 2048, 32768]: k is 1,024 tokens, m 1,024 k."""
    found = []
    for word in text.lower().split(","):
        scale = {"k": 1024, "m": 1024**2}.get(word[-1:], 1)
        found.append(positive(word if scale == 1 else word[:-1]) * scale)
    return found


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn a file that cannot be read as text into an `LclmError`."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise LclmError(f"cannot read {os.fspath(path)!r}: {reason}") from error
