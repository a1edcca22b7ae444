"""`lclm generate`: continue a prompt and say what it cost."""

import argparse
import sys
from collections.abc import Sequence

from lclm.cli import options
from lclm.errors import LclmError


def main(argv: Sequence[str]) -> None:
    """Stream a continuation to stdout, measurements to stderr."""
    parser = options.Parser("generate", "Continue a prompt, token by token.")
    options.model_options(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-p", "--prompt", help="the text to continue")
    where.add_argument("-f", "--file", help="a UTF-8 file to continue; - is stdin")
    parser.add_argument("--ask", help="a question put behind the text of --file")
    options.cache_options(parser)
    options.sampling_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no measurements")
    args = parser.parse_args(argv)
    prompt = _prompt(args)

    lm = options.load(args)
    stream = lm.generate(
        prompt,
        cache=args.cache,
        chunk=args.chunk,
        stream=lm.tokenizer is not None,
        **options.sampling(args),
    )
    if lm.tokenizer is None:
        print(*stream.tokens)
        made = stream
    else:
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        made = stream.result
    if not args.quiet:
        print(describe(made.stats), file=sys.stderr)


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
    text += args.ask or ""
    if not text:
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
