"""A small model over bytes with a sink of one kind, or none.

    lclm train --config=experiments/learned_sink/train.py:sink=token,seed=1

`sink`: token, BOS in place of each row's first byte; zero, one more in the softmax's
denominator; learned, a logit a head there; none.
"""

import ml_collections


def get_config(sink="none", seed=0, steps=120, length=256, batch=8, lr=4e-3):
    """Rows of `length` bytes cut anywhere from novels."""
    config = ml_collections.ConfigDict()
    config.name = f"{sink}-{seed}"
    config.title = f"Sink: {sink}, seed {seed}"
    config.model = dict(
        source="mini-bytes",
        scratch=True,
        tokenizer="bytes",
        sink=sink if sink in ("zero", "learned") else None,
    )
    if sink == "token":
        config.objective = "next_token:sink=1"
    config.data = dict(
        source="novels", held_out=["novels:only=persuasion"], packing="concat"
    )
    config.steps, config.batch, config.length = steps, batch, length
    config.compute = "float32"
    config.optimizer = dict(lr=lr, warmup=20, weight_decay=0.1)
    config.seed = seed
    return config
