"""`lclm eval`: one evaluation on one model, resumable."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lclm.cli import options
from lclm.errors import LclmError


def main(argv: Sequence[str]) -> None:
    """Run an evaluation, print its tables, keep its records and figures."""
    parser = options.Parser(
        "eval",
        "Run one evaluation; the same command again continues where it stopped.",
        epilog="example: lclm eval passkey smollm2-135m 'lengths=[512]' trials=3",
    )
    parser.add_argument("name", help="an evaluation that `lclm list evals` prints")
    options.model_options(parser)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="its options")
    parser.add_argument("--out", help="folder (default runs/eval-NAME)")
    args = parser.parse_intermixed_args(argv)

    from lclm.cli.job import CHOICE_KEYS, Choice, Job, Stage
    from lclm.cli.run import run_job
    from lclm.config import from_dict
    from lclm.evals import EVALS

    evaluation = from_dict(EVALS[args.name], settings(args.settings))
    held = {k: getattr(args, k) or "" for k in CHOICE_KEYS}
    choice = Choice(args.model, **held)
    choice.check()
    name = f"eval-{args.name}"
    job = Job(name, {"": choice}, (Stage(args.name, evaluation),))
    command = shlex.join(["lclm", "eval", *argv])
    run_job(job, Path(args.out or f"runs/{name}"), command)


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`["trials=3", "a.b=x"]` -> `{"trials": 3, "a": {"b": "x"}}`; values are JSON."""
    tree: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise LclmError(f"{pair!r} is not key=value, for example trials=3")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise LclmError(f"{pair!r}: {name} was already given as {node!r}")
        node[leaf] = value
    return tree
