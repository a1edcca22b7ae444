"""The `lclm` command: a table of commands, one error line, honest exit codes."""

import os
import sys
from collections.abc import Sequence

from lclm.errors import LclmError
from lclm.registry import Entry, Table

COMMANDS = Table(
    "command",
    {
        "run": Entry("lclm.cli.run:main", "run a config: --config=configs/demo.py"),
        "train": Entry("lclm.cli.train:main", "train a config: configs/smoke.py"),
        "data": Entry("lclm.cli.data:main", "tokenise, list, show, count: build ..."),
        "pull": Entry("lclm.cli.pull:main", "fetch a known model into the cache"),
        "list": Entry("lclm.cli.list:main", "what there is: models, caches, evals"),
        "generate": Entry("lclm.cli.generate:main", "continue a prompt"),
        "chat": Entry("lclm.cli.chat:main", "talk to a model in the terminal"),
        "eval": Entry("lclm.cli.eval:main", "run one evaluation on a model"),
        "lm_eval": Entry("lclm.cli.lm_eval:main", "lm-evaluation-harness on a model"),
        "compare": Entry("lclm.cli.compare:main", "one page over several runs"),
        "convert": Entry("lclm.cli.convert:main", "Hugging Face, GGUF, lclm folders"),
        "plan": Entry("lclm.cli.plan:main", "bytes of weights and cache, in advance"),
        "bench": Entry("lclm.cli.bench:main", "prefill and decode speed here"),
    },
)

USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 2 for a mistake in the input, 130 for an interrupt."""
    try:
        if argv is None:
            argv = sys.argv[1:]
            keep_compiled()
        return _dispatch(list(argv))
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


def keep_compiled() -> None:
    """Keep compiled programs between commands, apart for each kind of processor."""
    import hashlib

    from lclm.data.fetch import cache_folder

    try:
        with open("/proc/cpuinfo") as file:
            kind = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        kind = ""
    name = "xla-" + hashlib.sha256(kind.encode()).hexdigest()[:8]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / name))


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
