"""One million tokens through a model trained for eight thousand, in constant memory.

    lclm run --config=configs/million.py
    lclm run --config=configs/million.py:dtype=bfloat16,quantize=int8,length=131072

About 35 minutes on 2 CPU cores, estimated from 16,384 tokens read at 537 a second with
int8 rows. Expected: the cache never exceeds 1,024 tokens plus one chunk, and the last
tokens take no longer than the first (benchmarks/results/flat_cost.json holds the cost
behind 8k to 1M). The King James Bible has just over one million tokens.
"""

import ml_collections


def get_config(
    model="smollm2-135m", source="kjv", length=1_000_000, dtype="", quantize=""
):
    """`length`: tokens to read."""
    config = ml_collections.ConfigDict()
    config.name = "million"
    config.title = "One million tokens in constant memory"
    config.model = model
    config.dtype = dtype
    config.quantize = quantize
    splits = [s for s in (8192, 131072, 524288) if s < length]
    config.stages = [
        dict(
            eval="perplexity",
            source=source,
            length=length,
            splits=splits,
            bucket=max(256, length // 256),
            readings=[
                dict(
                    cache="streaming:sinks=4,window=1020",
                    label="StreamingLLM 4 + 1020",
                )
            ],
        )
    ]
    return config
