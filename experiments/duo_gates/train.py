"""DuoAttention gates for SmolLM2-135M: which of its 90 kv heads need the whole text.

    lclm train --config=experiments/duo_gates/train.py --workdir=runs/duo_gates

The objective, penalty, optimizer and shape of the schedule are the paper's (arXiv
2410.10819); rows, steps and the streaming sizes are cut to what two CPU cores do in
half an hour. The run's extra.safetensors is the file that `duo:gates=FILE` reads.
"""

import ml_collections


def get_config(steps=45, length=768, lr=0.05, keys=8, words=10):
    """`keys` sequences of `words` words are hidden in rows of `length` tokens."""
    config = ml_collections.ConfigDict()
    config.name = "duo-gates-smollm2"
    config.title = "DuoAttention gates of SmolLM2-135M"
    config.length = length
    config.model = dict(source="smollm2-135m")
    config.objective = "duo_gates:sinks=16,window=128"
    config.data = dict(source=f"passkeys:book=novels,keys={keys},words={words}")
    config.steps = steps
    config.batch = 1
    config.compute = "float32"
    config.remat = dict(kind="none")
    config.checkpoints = dict(every=5)
    config.log_every = 1
    config.optimizer = dict(
        lr=lr,
        schedule="trapezoid",
        warmup=max(1, steps // 15),
        decay=max(1, steps // 5),
        floor=0.1,
        weight_decay=0.0,
        clip_norm=None,
    )
    return config
