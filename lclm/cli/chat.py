"""`lclm chat`: a conversation in the terminal."""

import sys
from collections.abc import Sequence

from lclm.cli import options
from lclm.cli.generate import describe
from lclm.errors import LclmError


def main(argv: Sequence[str]) -> None:
    """Read a line, answer it, remember both; end of input leaves."""
    parser = options.Parser("chat", "Talk to a model; Ctrl-D leaves.")
    options.model_options(parser)
    parser.add_argument("--system", help="a system message to begin with")
    options.cache_options(parser)
    options.sampling_options(parser)
    parser.add_argument("--stats", action="store_true", help="measure each answer")
    args = parser.parse_args(argv)

    lm = options.load(args)
    if lm.tokenizer is None:
        raise LclmError(
            f"{args.model!r} has no tokenizer to chat with: put a tokenizer.json "
            "beside its weights"
        )
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(system)
    while (line := _ask()) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        stream = lm.generate(
            lm.tokenizer.encode(lm.tokenizer.chat(messages)),
            cache=args.cache,
            chunk=args.chunk,
            stream=True,
            **options.sampling(args),
        )
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": stream.result.text})
        if args.stats:
            print(describe(stream.result.stats), file=sys.stderr)


def _ask() -> str | None:
    """The next line of the user; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
