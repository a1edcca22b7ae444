"""A tiny model over bytes learns to write like the King James Bible.

lclm train --config=configs/smoke.py
"""

import ml_collections


def get_config(model="tiny-bytes", source="kjv", steps=150, length=1024, batch=8):
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
    return config
