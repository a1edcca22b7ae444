"""A tiny model over bytes learns to write like the King James Bible.

lclm train --config=configs/smoke.py                # 45 seconds on 2 CPU cores
lclm train --config=configs/smoke.py --until=40     # stops there; the first goes on

`model=tiny-bytes-hybrid` has Mamba layers between those of attention. Left in
runs/smoke: metrics.jsonl, events/, loss.png, checkpoints/, model/, hf/ (for
transformers; `tiny-bytes` only) and sample.txt.
Expected: loss from 5.60 to 2.21 nats a byte, about 9,000 bytes a second.
"""

import ml_collections


def get_config(model="tiny-bytes", source="kjv", steps=80, length=512, batch=8):
    """`model`: `tiny-bytes`, or `tiny-bytes-hybrid` with Mamba layers."""
    config = ml_collections.ConfigDict()
    config.name = "smoke"
    config.title = "A tiny model over bytes"
    config.model = dict(source=model, scratch=True, tokenizer="bytes")
    config.data = dict(source=source)
    config.steps = steps
    config.batch = batch
    config.length = length
    config.compute = "float32"
    config.optimizer = dict(lr=3e-3, warmup=10, weight_decay=0.1)
    config.checkpoints = dict(every=40)
    config.hugging_face = model == "tiny-bytes"
    config.sample = dict(prompt="And God said, ", tokens=120)
    return config
