"""`lclm lm_eval`: lm-eval's own command line, with lclm's models and tasks in it."""

import sys
from collections.abc import Sequence

from lclm.cli.options import Parser

COMMANDS = ("run", "ls", "validate")


def main(argv: Sequence[str]) -> None:
    """Register `lclm` among lm-eval's models, then let lm-eval read the arguments."""
    parser = Parser(
        "lm_eval",
        "Run lm-evaluation-harness on lclm's models. Arguments are those of the "
        "lm_eval command, which cannot find other packages' models by itself; "
        "--model is lclm and --include_path the folder of lclm's tasks unless given.",
        usage="lclm lm_eval [lm_eval arguments]",
        epilog="example: lclm lm_eval --model_args pretrained=smollm2-135m,"
        "cache=streaming:sinks=4,window=1020 --tasks lclm_passkey",
    )
    parser.add_argument("arguments", nargs="+", help="`lclm lm_eval run -h` says all")
    asks_help = argv and argv[0] in ("-h", "--help")
    args = parser.parse_args(argv if asks_help else ["--", *argv])

    from lclm.lm_eval import TASKS, require

    require()
    from lm_eval.__main__ import cli_evaluate

    import lclm.lm_eval.harness  # noqa: F401 - registers itself

    given = args.arguments
    command, rest = (given[0], given[1:]) if given[0] in COMMANDS else ("run", given)
    ours = ["--include_path", TASKS]
    if command == "run":
        ours += ["--model", "lclm"]
    before, sys.argv = sys.argv, ["lm-eval", command, *ours, *rest]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
