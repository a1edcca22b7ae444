"""Pretraining with attention sinks (arXiv 2309.17453, section 3.3).

lclm train --config=configs/learned_sink.py:sink=token     (160M; 8 A6000 in the paper)
lclm train --config=configs/learned_sink.py:size=cpu       (a tiny model over bytes)

`sink`: token, the BOS token first in every document; zero, SoftMax-off-by-one; learned,
a logit a head; none. Numbers: not measured yet (paper, cache 1 + 1023: token 18.01,
zero 19.90, none 18.49).
"""

import ml_collections


def get_config(size="full", model="", data="", length=0, sink="token"):
    """`model` is a preset; it is drawn anew."""
    small = size == "cpu"
    config = ml_collections.ConfigDict()
    config.name = f"sink-{sink}"
    config.title = f"Pretraining with a sink: {sink}"
    config.length = length or (256 if small else 2048)
    config.model = dict(
        source=model or ("tiny-bytes" if small else "smollm2-135m"),
        scratch=True,
        tokenizer="bytes" if small else "model",
        sink=sink if sink in ("zero", "learned") else None,
    )
    if sink == "token":
        config.objective = "next_token:sink=1"
    config.data = dict(source=data or "kjv")
    config.steps = 50 if small else 143000
    config.batch = 4 if small else 256
    config.compute = "float32" if small else "bfloat16"
    config.optimizer = dict(lr=3e-3 if small else 6e-4, warmup=config.steps // 100)
    return config
