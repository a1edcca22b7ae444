"""Full attention in two layers of six, wherever `place` says, sparse in the others.

    lclm train --config=experiments/longgen/train.py:place=top,seed=1

A sparse layer sees 4 sinks and the last 28 bytes. `place`: middle, bottom, top or
spread; full for six full layers, sparse for none.
"""

import ml_collections

COUNTS = dict(full=6, sparse=0)


def get_config(place="middle", seed=0, steps=80, length=512, batch=4, lr=4e-3):
    """Rows of `length` bytes cut anywhere from novels."""
    config = ml_collections.ConfigDict()
    config.name = f"{place}-{seed}"
    config.title = f"Full layers: {place}, seed {seed}"
    layers = f"full={COUNTS.get(place, 2)},sinks=4,window=28"
    if place not in COUNTS:
        layers += f",place={place}"
    config.model = dict(
        source="mini-bytes-deep",
        scratch=True,
        tokenizer="bytes",
        hybrid=f"longgen:{layers}",
        rope=dict(context=length),
        laid="rows",
    )
    config.data = dict(
        source="novels", held_out=["novels:only=persuasion"], packing="concat"
    )
    config.steps, config.batch, config.length = steps, batch, length
    config.compute = "float32"
    config.optimizer = dict(lr=lr, warmup=20, weight_decay=0.1)
    config.seed = seed
    return config
