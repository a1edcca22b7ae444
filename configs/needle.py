"""Needle in a haystack: invented facts inside a real book, as a heatmap.

    lclm run --config=configs/needle.py
    lclm run --config=configs/needle.py:needles=3,source=austen

About 6 minutes on 2 CPU cores (20 questions up to 4k tokens).
Expected: every needle at 512, 1,024 and 2,048 tokens at depths 0, 0.5 and 0.9 (9 of 9
with transformers on the same weights and the same prompts).
"""

import ml_collections


def get_config(
    model="smollm2-135m", source="kjv", needles=1, spacing="linear", dtype=""
):
    """`spacing=sigmoid` crowds the depths towards both ends."""
    config = ml_collections.ConfigDict()
    config.name = "needle"
    config.title = "Needle in a haystack"
    config.model = model
    config.dtype = dtype
    config.stages = [
        dict(
            eval="needle",
            source=source,
            lengths=[512, 1024, 2048, 4096],
            points=5,
            spacing=spacing,
            needles=needles,
        )
    ]
    return config
