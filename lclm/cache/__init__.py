"""Cache policies by name, and the short string form `name:key=value,...`."""

from typing import Any

from lclm.cache.base import CachePolicy
from lclm.cache.sized import from_bytes, in_bytes
from lclm.registry import Entry, Table
from lclm.shorthand import build, split

EXAMPLE = "streaming:sinks=4,window=1020"

POLICIES = Table(
    "cache policy",
    {
        "full": Entry("lclm.cache.policies:Full", "keep every token"),
        "window": Entry("lclm.cache.policies:Window", "the last `window` tokens"),
        "streaming": Entry(
            "lclm.cache.policies:Streaming",
            "StreamingLLM: `sinks` first tokens and the last `window` (2309.17453)",
        ),
        "duo": Entry(
            "lclm.cache.duo:Duo",
            "DuoAttention: gates say which heads keep the whole text (2410.10819)",
        ),
        "recompute": Entry(
            "lclm.cache.policies:Recompute",
            "no cache: re-read the last `window` tokens for every token",
        ),
        "quantised": Entry(
            "lclm.cache.quantised:Quantised",
            "KIVI: codes of `bits` bits, the last `residual` tokens whole (2402.02750)",
        ),
        "h2o": Entry(
            "lclm.cache.scores:H2O", "most attention received so far (2306.14048)"
        ),
        "tova": Entry(
            "lclm.cache.scores:TOVA", "most attention of the last query (2401.06104)"
        ),
        "snapkv": Entry(
            "lclm.cache.scores:SnapKV",
            "most attention of the last queries, pooled (2404.14469)",
        ),
        "pyramidkv": Entry(
            "lclm.cache.scores:PyramidKV",
            "SnapKV with budgets that fall with depth (2406.02069)",
        ),
        "expected_attention": Entry(
            "lclm.cache.expected:ExpectedAttention",
            "most attention of queries still to come (2510.00636)",
        ),
        "knorm": Entry("lclm.cache.scores:Knorm", "small keys stay (2406.11430)"),
        "locret": Entry(
            "lclm.cache.locret:Locret", "trained retaining heads choose (2410.01805)"
        ),
        "infinipot": Entry(
            "lclm.cache.infinipot:InfiniPot",
            "a pot distilled by novelty and a catalyst when full (2410.01518)",
        ),
        "keydiff": Entry("lclm.cache.scores:KeyDiff", "unusual keys stay (2504.15364)"),
        "quest": Entry(
            "lclm.cache.quest:Quest",
            "keep every token, read the pages a query points to (2406.10774)",
        ),
    },
)


def make(policy: Any) -> CachePolicy:
    """A policy from itself, a table with a "name", or a `name:key=value,...` string.

    A budget or window may be an amount of bytes, `h2o:budget=64MiB`
    (`lclm.cache.sized`).
    """
    if isinstance(policy, CachePolicy):
        return policy
    name, options = split(POLICIES.kind, policy, EXAMPLE)
    if key := in_bytes(options):
        return from_bytes(POLICIES, name, options, key)
    return build(POLICIES, policy, EXAMPLE)
