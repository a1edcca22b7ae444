"""Infini-attention from scratch over bytes: a memory beside segments of 64.

    lclm train --config=experiments/infini/train.py:model=infini,seed=1

`model`: infini; segment, a sliding window of 64 without a memory; or full attention.
Gates have a rate of their own and no weight decay.
"""

import ml_collections

SEGMENT = 64


def get_config(model="infini", seed=0, steps=120, length=256, batch=8, lr=4e-3):
    """Rows of `length` bytes, four segments each."""
    config = ml_collections.ConfigDict()
    config.name = f"{model}-{seed}"
    config.title = f"{model}, seed {seed}"
    config.model = dict(
        source="mini-bytes",
        scratch=True,
        tokenizer="bytes",
        hybrid=f"infini:segment={SEGMENT}" if model == "infini" else None,
    )
    if model == "segment":
        config.model.hybrid = "longgen:full=0,sinks=0,window=64"
    config.data = dict(
        source="novels", held_out=["novels:only=persuasion"], packing="concat"
    )
    config.steps, config.batch, config.length = steps, batch, length
    config.compute = "float32"
    gates = dict(match=r"infini/gate$", lr=10.0, weight_decay=0.0)
    config.optimizer = dict(
        lr=lr, warmup=20, weight_decay=0.1, groups=[gates] if model == "infini" else []
    )
    config.seed = seed
    return config
