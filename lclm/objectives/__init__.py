"""What a training step can minimise, by name."""

from typing import Any

from lclm.objectives.base import Objective
from lclm.registry import Entry, Table
from lclm.shorthand import build

OBJECTIVES = Table(
    "objective",
    {
        "next_token": Entry(
            "lclm.objectives.next_token:NextToken",
            "cross-entropy of the next token, balance loss of experts included",
        ),
    },
)


def make(objective: Any) -> Objective:
    """An objective from its table form or `name:key=value,...`."""
    if isinstance(objective, str | dict):
        return build(OBJECTIVES, objective, "next_token")
    return objective
