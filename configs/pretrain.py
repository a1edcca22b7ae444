"""Pretraining of any preset from scratch.

lclm train --config=configs/pretrain.py:model=tiny-bytes-hybrid,tokenizer=bytes
lclm train --config=configs/pretrain.py:model=mamba-130m,tokenizer=FOLDER

`lclm list` names the presets. Numbers: not measured yet.
"""

import ml_collections


def get_config(
    size="full",
    model="tiny-bytes",
    data="",
    tokenizer="bytes",
    length=0,
    steps=0,
    remat="none",
):
    """`tokenizer` is bytes, model, or a folder with a tokenizer.json."""
    small = size == "cpu"
    config = ml_collections.ConfigDict()
    config.name = f"pretrain-{model}"
    config.title = f"Pretraining {model}"
    config.model = dict(source=model, scratch=True, tokenizer=tokenizer)
    config.data = dict(source=data or "kjv")
    config.length = length or (256 if small else 2048)
    config.steps = steps or (50 if small else 10000)
    config.batch = 4 if small else 64
    config.compute = "float32" if small else "bfloat16"
    config.remat = dict(kind=remat)
    config.optimizer = dict(
        lr=3e-3 if small else 6e-4, warmup=max(config.steps // 100, 1), floor=0.1
    )
    return config
