"""A real model reads a text four times longer than it was trained for.

    lclm run --config=configs/demo.py

SmolLM2-135M-Instruct (trained on 8k tokens) reads the King James Bible: 32k tokens with
a sliding window and with StreamingLLM, 12k with full attention; then it is asked for a
passkey. Last, a tiny model is trained from scratch (smoke.py). About 6 minutes on 2 CPU
cores without AMX when nothing else runs, 8 beside other work; a first run also
compiles, and downloads 103 MB.
Expected: perplexity before 8k and from 8k to 32k of 7.2 and 14.0 with StreamingLLM,
13.9 and 26.3 with the window without sinks, both in 45 MiB of cache; full attention 7.0
and, from 8k to 12k, 26.4 in 541 MiB. (int8 rows; the opening of this book is easy for
the model: compare caches, not columns.) The passkey is found at 4k and 8k. The tiny
model's loss falls from 5.6 to 2.5 nat in 40 steps, stopped and resumed half way.
"""

import ml_collections


def get_config(
    model="smollm2-135m",
    source="kjv",
    length=32768,
    full=12288,
    dtype="",
    quantize="int8",
    smoke="",
):
    """`length`: tokens read with bounded caches; `full`: with full attention.

    `smoke`: the training config, smoke.py beside this file where empty.
    """
    config = ml_collections.ConfigDict()
    config.name = "demo"
    config.title = "Four times the trained context"
    config.about = (
        "One small pretrained model reads one long book. The same tokens, three "
        "caches: what each one costs, and what it forgets."
    )
    config.model = model
    config.dtype = dtype
    config.quantize = quantize
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
        dict(
            train=smoke or __file__.replace("demo.py", "smoke.py:steps=40"),
            title="A tiny model trained from scratch, stopped half way and resumed",
        ),
    ]
    return config
