"""Attention patterns by name: which keys a query sees, as a symbolic mask."""

import inspect
from typing import Any

from lclm.registry import Entry, Table
from lclm.shorthand import build
from pallas_kernels.mask import Mask

PATTERNS = Table(
    "attention pattern",
    {
        "causal": Entry("lclm.attention.patterns:causal", "every earlier token"),
        "window": Entry(
            "lclm.attention.patterns:window",
            "the last `window` tokens, itself included",
        ),
        "sink_window": Entry(
            "lclm.attention.patterns:sink_window",
            "`sinks` first tokens and the last `window` (2309.17453)",
        ),
        "chunk": Entry(
            "lclm.attention.patterns:chunk", "tokens of the same block of `chunk`"
        ),
        "shifted_groups": Entry(
            "lclm.attention.patterns:shifted_groups",
            "S2-Attn: groups of `group`, half the heads shifted (2309.12307)",
        ),
        "block_sparse": Entry(
            "lclm.attention.patterns:block_sparse",
            "`local` near blocks and every `stride`-th one, per kv head (2410.01485)",
        ),
    },
)


def make(pattern: Any) -> Mask:
    """A mask from itself, a table with a "name", or a `name:key=value,...` string."""
    if isinstance(pattern, Mask):
        return pattern
    return build(PATTERNS, pattern, "window:window=512")


def for_length(pattern: str, length: int) -> str:
    """The pattern with the length of rows filled in, where it takes one."""
    name = pattern.partition(":")[0].strip()
    if name not in PATTERNS or "length=" in pattern:
        return pattern
    if "length" not in inspect.signature(PATTERNS[name]).parameters:
        return pattern
    return f"{pattern}{',' if ':' in pattern else ':'}length={length}"
