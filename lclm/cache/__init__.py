"""Cache policies by name, and the short string form `name:key=value,...`."""

from typing import Any

from lclm.cache.base import CachePolicy
from lclm.registry import Entry, Table
from lclm.shorthand import build

POLICIES = Table(
    "cache policy",
    {
        "full": Entry("lclm.cache.policies:Full", "keep every token"),
        "window": Entry("lclm.cache.policies:Window", "the last `window` tokens"),
        "streaming": Entry(
            "lclm.cache.policies:Streaming",
            "StreamingLLM: `sinks` first tokens and the last `window` (2309.17453)",
        ),
        "recompute": Entry(
            "lclm.cache.policies:Recompute",
            "no cache: re-read the last `window` tokens for every token",
        ),
    },
)


def make(policy: Any) -> CachePolicy:
    """A policy from itself, a table with a "name", or a `name:key=value,...` string."""
    if isinstance(policy, CachePolicy):
        return policy
    return build(POLICIES, policy, "streaming:sinks=4,window=1020")
