"""Mixers and feed-forwards: what a layer is made of, by the `TYPE` of its spec.

A mixer is a Linen module with fields (spec, width, norm, index, policy) and
`__call__(x [B, T, D], step, state) -> (y [B, T, D], state)`. One function serves
training (state None in and out), prefill in chunks and decoding (T = 1). Other than
attention, whose cache belongs to a policy, a mixer has a static method
`init_state(spec, width, batch, dtype)`: a pytree whose leaves lead with the batch.
"""

from lclm.registry import Entry, Table

MIXERS = Table(
    "mixer",
    {
        "attention": Entry(
            "lclm.blocks.attention:Attention", "grouped-query softmax attention"
        ),
        "mamba": Entry("lclm.blocks.mamba:Mamba", "Mamba-1 selective state space"),
        "mamba2": Entry("lclm.blocks.mamba2:Mamba2", "Mamba-2, state-space duality"),
        "megalodon": Entry(
            "lclm.blocks.megalodon:Megalodon", "complex EMA and chunk attention"
        ),
        "infini": Entry(
            "lclm.blocks.infini:Infini", "local attention with a compressive memory"
        ),
    },
)

FEED_FORWARDS = Table(
    "feed-forward",
    {
        "mlp": Entry("lclm.blocks.mlp:Mlp", "gated feed-forward"),
        "moe": Entry("lclm.blocks.moe:Moe", "mixture of gated feed-forwards"),
        "ffn": Entry("lclm.blocks.megalodon:Ffn", "Megalodon's feed-forward"),
    },
)
