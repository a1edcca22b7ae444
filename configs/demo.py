"""A real model reads a text four times longer than it was trained for.

    lclm run --config=configs/demo.py

SmolLM2-135M-Instruct (trained on 8k tokens) reads the King James Bible: 32k tokens with
a sliding window and with StreamingLLM, 12k with full attention; then it is asked for a
passkey. About 4 minutes on 2 CPU cores; downloads 103 MB once.
Expected: past 8k, StreamingLLM keeps the perplexity it had before 8k with a cache of
1,024 tokens; the window without sinks is about twice as bad from its first eviction on
(on the first 4k tokens: 10.7 against 5.8), and full attention falls apart past 8k. The
passkey is found at 4k and 8k.
"""

import ml_collections


def get_config(model="smollm2-135m", source="kjv", length=32768, full=12288, dtype=""):
    """`length`: tokens read with bounded caches; `full`: with full attention."""
    config = ml_collections.ConfigDict()
    config.name = "demo"
    config.title = "Four times the trained context"
    config.about = (
        "One small pretrained model reads one long book. The same tokens, three "
        "caches: what each one costs, and what it forgets."
    )
    config.model = model
    config.dtype = dtype
    config.stages = [
        dict(
            eval="perplexity",
            title="Reading far past the trained length",
            source=source,
            length=length,
            splits=[8192],
            readings=[
                dict(cache="full", label="full attention", length=full),
                dict(cache="window:window=1024", label="window 1024"),
                dict(
                    cache="streaming:sinks=4,window=1020",
                    label="StreamingLLM 4 + 1020",
                ),
            ],
        ),
        dict(eval="passkey", lengths=[4096, 8176], depths=[0.5]),
    ]
    return config
