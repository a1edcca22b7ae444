"""lm-evaluation-harness runs lclm's models and tasks: the extra `lclm[lm-eval]`.

`LclmHarness` is the model, for `lm_eval.simple_evaluate(model=LclmHarness(...))`, and
`TASKS` the folder of tasks, for `include_path`. Importing this needs no lm-eval.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lclm.errors import LclmError

TASKS = str(Path(__file__).parent / "tasks")

__all__ = ["TASKS", "LclmHarness", "require"]


def require() -> None:
    """Raise LclmError where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise LclmError("lm-eval is not installed: pip install 'lclm[lm-eval]'")


def __getattr__(name: str) -> Any:
    if name == "LclmHarness":
        require()
        from lclm.lm_eval.harness import LclmHarness

        return LclmHarness
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
