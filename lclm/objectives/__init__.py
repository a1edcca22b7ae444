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
        "duo_gates": Entry(
            "lclm.objectives.duo_gates:DuoGates",
            "which kv heads need the whole text (DuoAttention, 2410.10819)",
        ),
        "locret_heads": Entry(
            "lclm.objectives.locret_heads:LocretHeads",
            "which tokens answers will look at (Locret, 2410.01805)",
        ),
    },
)


def make(objective: Any) -> Objective:
    """An objective from its table form or `name:key=value,...`."""
    if isinstance(objective, str | dict):
        return build(OBJECTIVES, objective, "next_token")
    return objective
