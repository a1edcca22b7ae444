"""Passkey retrieval by length and depth, full attention against StreamingLLM.

    lclm run --config=configs/passkey.py

About 3 minutes on 2 CPU cores.
Expected: full attention finds 3 of 3 at every length from 512 to 4,096 tokens;
StreamingLLM only finds keys among the last 1,020 tokens: it reads on for ever, it does
not remember.
"""

import ml_collections


def get_config(model="smollm2-135m", trials=1, score="generate", dtype=""):
    """`score=forced` adds the log-probability of the key."""
    config = ml_collections.ConfigDict()
    config.name = "passkey"
    config.title = "Five digits in a long text"
    config.model = model
    config.dtype = dtype
    config.stages = [
        dict(
            eval="passkey",
            lengths=[512, 1024, 2048, 4096],
            depths=[0.1, 0.5, 0.9],
            trials=trials,
            caches=["full", "streaming:sinks=4,window=1020"],
            score=score,
        )
    ]
    return config
