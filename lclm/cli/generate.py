"""`lclm generate`: continue a prompt and say what it cost."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lclm.cli import options
from lclm.errors import LclmError
from lclm.serve.result import Generation

if TYPE_CHECKING:
    from lclm.language_model import LanguageModel


def main(argv: Sequence[str]) -> None:
    """Stream a continuation to stdout, measurements to stderr."""
    parser = options.Parser("generate", "Continue a prompt, token by token.")
    options.model_options(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-p", "--prompt", help="the text to continue")
    where.add_argument("-f", "--file", help="a UTF-8 file to continue; - is stdin")
    where.add_argument(
        "--load-cache", metavar="FILE", help="a text read before, by --save-cache"
    )
    parser.add_argument("--ask", help="a question put behind the text")
    parser.add_argument(
        "--save-cache", metavar="FILE", help="keep the text, as read, before --ask"
    )
    options.cache_options(parser)
    options.sampling_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no measurements")
    args = parser.parse_args(argv)
    prompt = None if args.load_cache else _prompt(args)

    lm = options.load(args)
    if prompt is None or args.save_cache:
        made = _behind(lm, prompt, args)
    else:
        made = lm.generate(
            prompt + (args.ask or ""),
            cache=args.cache,
            chunk=args.chunk,
            stream=lm.tokenizer is not None,
            **options.sampling(args),
        )
    if made is None:
        return
    if isinstance(made, Generation):
        print(*made.tokens)
    else:
        for piece in made:
            print(piece, end="", flush=True)
        print()
        made = made.result
    if not args.quiet:
        print(describe(made.stats), file=sys.stderr)


def _behind(lm: "LanguageModel", prompt: str | None, args: argparse.Namespace):
    """Continue a text that is read apart from the question: it is kept, or was."""
    if args.load_cache:
        context = lm.load_context(args.load_cache)
    else:
        context = lm.prefill(prompt, cache=args.cache, chunk=args.chunk)
    if args.save_cache:
        context.save(args.save_cache)
        print(describe(context.stats), file=sys.stderr)
        if args.ask is None:
            return None
    return context.generate(
        args.ask or "", stream=lm.tokenizer is not None, **options.sampling(args)
    )


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        text = args.prompt
    else:
        with options.readable(args.file):
            if args.file == "-":
                text = sys.stdin.read()
            else:
                with open(args.file, encoding="utf-8") as file:
                    text = file.read()
    if not text and not args.ask:
        raise LclmError("the prompt is empty: give at least one token of text")
    return text


def describe(stats) -> str:
    """One line of `Stats`: tokens, seconds, cache bytes."""
    from lclm.serve.memory import format_bytes

    return (
        f"read {stats.prompt_tokens:,} tokens in {stats.prefill_seconds:.2f} s, "
        f"wrote {stats.new_tokens:,} in {stats.decode_seconds:.2f} s "
        f"({stats.tokens_per_second:.1f} tokens/s), "
        f"cache {format_bytes(stats.bytes)}"
    )
