"""The `lclm` command: a table of commands, one error line, honest exit codes."""

import os
import sys
from collections.abc import Sequence

from lclm.errors import LclmError
from lclm.registry import Entry, Table

COMMANDS = Table(
    "command",
    {
        "run": Entry("lclm.cli.main:run", "run a config: --config=configs/demo.py"),
        "pull": Entry("lclm.cli.pull:main", "fetch a known model into the cache"),
        "list": Entry("lclm.cli.list:main", "what there is: models, caches, evals"),
        "generate": Entry("lclm.cli.generate:main", "continue a prompt"),
        "chat": Entry("lclm.cli.chat:main", "talk to a model in the terminal"),
        "eval": Entry("lclm.cli.eval:main", "run one evaluation on a model"),
        "convert": Entry("lclm.cli.convert:main", "Hugging Face, GGUF, lclm folders"),
        "plan": Entry("lclm.cli.plan:main", "bytes of weights and cache, in advance"),
        "bench": Entry("lclm.cli.bench:main", "prefill and decode speed here"),
    },
)

USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 2 for a mistake in the input, 130 for an interrupt."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except LclmError as error:
        print("lclm:", " ".join(str(error).split()), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("lclm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left: give Python nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        from lclm import __version__

        print(f"lclm {__version__}")
        return 0
    status = COMMANDS[argv[0]](argv[1:])
    return int(status or 0)


def run(argv: Sequence[str]) -> None:
    """`lclm run`: one job, from a config to a report."""
    from lclm.cli.options import Parser

    parser = Parser("run", "Run the job a config describes; again continues it.")
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:KEY=VALUE,...]", help="the job"
    )
    parser.add_argument("--workdir", help="where results go (default runs/NAME)")
    args = parser.parse_args(argv)

    from lclm.cli.run import run as run_job

    run_job(args.config, workdir=args.workdir)


def _help() -> str:
    lines = [f"  {name:10}{about}" for name, about in COMMANDS.about().items()]
    return "\n".join(
        [
            "usage: lclm COMMAND [options]     lclm COMMAND --help says more",
            "",
            "Language models over long contexts, in JAX.",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
