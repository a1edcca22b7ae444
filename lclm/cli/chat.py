"""`lclm chat`: a conversation in the terminal."""

import sys
from collections.abc import Sequence

from lclm.cli import options
from lclm.cli.generate import describe


def main(argv: Sequence[str]) -> None:
    """Read a line, answer it, keep both in one cache; end of input leaves."""
    parser = options.Parser("chat", "Talk to a model; Ctrl-D leaves.")
    options.model_options(parser)
    parser.add_argument("--system", help="a system message to begin with")
    options.cache_options(parser, None, "streaming:sinks=4,window=2044")
    options.sampling_options(parser)
    parser.add_argument("--stats", action="store_true", help="measure each answer")
    args = parser.parse_args(argv)

    from lclm.conversation import Conversation

    talk = Conversation(
        options.load(args), args.cache, system=args.system, chunk=args.chunk
    )
    while (line := _ask()) is not None:
        if not line.strip():
            continue
        stream = talk.ask(line, **options.sampling(args))
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        if args.stats:
            print(describe(stream.result.stats), file=sys.stderr)


def _ask() -> str | None:
    """The next line of the user; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
