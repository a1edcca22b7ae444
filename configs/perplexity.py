"""Perplexity of one text under many caches, sliding-window evaluation among them.

    lclm run --config=configs/perplexity.py
    lclm run --config=configs/perplexity.py:length=4096,source=austen

About 3 minutes on 2 CPU cores at 16k tokens.
Expected: full attention is best up to the trained 8k and falls apart past it; more
sinks than 4 change nothing, no sinks ruin it (arXiv 2309.17453, table 2); the sliding
evaluation with stride 512 bounds what a window of 1,024 tokens can reach.
"""

import ml_collections


def get_config(model="smollm2-135m", source="kjv", length=16384, dtype=""):
    """`length`: tokens read by every cache but the full one, which stops at 10k."""
    config = ml_collections.ConfigDict()
    config.name = "perplexity"
    config.title = "Perplexity by cache"
    config.model = model
    config.dtype = dtype
    streaming = [
        dict(cache=f"streaming:sinks={sinks},window={1024 - sinks}")
        for sinks in (0, 1, 4, 16)
    ]
    config.stages = [
        dict(
            eval="perplexity",
            source=source,
            length=length,
            splits=[1024, 8192],
            readings=[
                dict(cache="full", length=10240),
                dict(cache="window:window=1024"),
                *streaming,
                dict(
                    cache="full", window=1024, stride=512, label="sliding 1024 by 512"
                ),
            ],
        )
    ]
    return config
