"""What evaluating costs beside the model: time in its calls against the whole command.

    python -m benchmarks.evaluation [--model=smollm2-135m] [--length=2048]

Runs `lclm eval` twice in one process for each of some evaluations, the second time (all
programs compiled) under a clock: `model` are the seconds in the model's own calls
(reading, writing, losses), `other` those in making examples, tokenizing, scoring,
keeping records and writing the page. Loading the weights is apart. A third time, with
everything answered, is `again`: what the same command costs then.
Writes benchmarks/results/evaluation.json.
"""

import argparse
import contextlib
import functools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.compare import cpu_model

HERE = Path(__file__).parent


class Clock:
    """Seconds in functions that are watched; a call inside another counts once."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def watched(self, call: Callable) -> Callable:
        """`call`, timed."""

        @functools.wraps(call)
        def timed(*args, **kwargs):
            self.depth += 1
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - began

        return timed


@contextlib.contextmanager
def watching(clock: Clock, owner: object, *names: str) -> Iterator[None]:
    """Time these attributes of a class or module."""
    found = {name: getattr(owner, name) for name in names}
    for name, call in found.items():
        setattr(owner, name, clock.watched(call))
    try:
        yield
    finally:
        for name, call in found.items():
            setattr(owner, name, call)


def measure(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds of one `lclm eval` into an empty folder, and of the same again."""
    from lclm import context, language_model
    from lclm.cli.main import main

    def run() -> float:
        began = time.perf_counter()
        if main(["eval", *command, "--out", str(folder)]):
            raise SystemExit(f"lclm eval {' '.join(command)} failed")
        return time.perf_counter() - began

    run()
    shutil.rmtree(folder)
    model, load = Clock(), Clock()
    with (
        watching(load, language_model, "load"),
        watching(model, language_model.LanguageModel, "nll", "generate", "prefill"),
        watching(model, context.Context, "generate", "resume", "nll", "score"),
    ):
        total = run() - load.seconds
        again = run()
    other = total - model.seconds
    return {
        "model": model.seconds,
        "other": other,
        "overhead": other / model.seconds,
        "again": again,
    }


def main() -> None:
    """Measure and write the JSON."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", default="smollm2-135m")
    flags.add_argument("--length", type=int, default=2048)
    args = flags.parse_args()
    lengths = f"lengths=[{args.length}]"
    commands = {
        "passkey": ["passkey", args.model, lengths, "trials=3"],
        "needle": ["needle", args.model, lengths, "points=5"],
        "ruler": ["ruler", args.model, lengths, "samples=1"],
        "perplexity": [
            "perplexity",
            args.model,
            f"length={args.length}",
            "documents=3",
        ],
    }
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands.items():
            rows[name] = measure(command, Path(folder) / name)
            print(name, json.dumps(rows[name]), file=sys.stderr)
    found = {"cpu": cpu_model(), "model": args.model, "length": args.length}
    path = HERE / "results" / "evaluation.json"
    path.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
