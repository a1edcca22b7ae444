"""Mixers and feed-forwards."""

from lclm.registry import Entry, Table

MIXERS = Table(
    "mixer",
    {
        "attention": Entry(
            "lclm.blocks.attention:Attention", "grouped-query softmax attention"
        ),
    },
)
