"""ProLong (arXiv 2410.02660), stage 1: 64k tokens, theta 8e6.

lclm train --config=configs/prolong_stage1.py:model=FOLDER     (8B; 2.2k H100 hours)
lclm train --config=configs/prolong_stage1.py:size=cpu         (SmolLM2, minutes)

The paper's mixture is 30% repositories, 30% books, 3% textbooks, 37% short text; here
one source stands for it until a config of your own names parts (docs/training.md).
Numbers: not measured yet.
"""

import ml_collections


def get_config(size="full", model="", data=""):
    """`data` is one source in place of the mixture."""
    small = size == "cpu"
    config = ml_collections.ConfigDict()
    config.name = "prolong-stage1"
    config.title = "ProLong, stage 1"
    config.length = 1024 if small else 65536
    config.model = dict(
        source=model or ("smollm2-135m" if small else "llama-3-8b"),
        rope=dict(theta=8e6, context=config.length),
    )
    config.data = dict(source=data or "novels")
    config.steps = 10 if small else 5000
    config.batch = 1 if small else 64
    config.accumulate = 1 if small else 64
    config.compute = "float32" if small else "bfloat16"
    config.remat = dict(kind="attention")
    config.optimizer = dict(
        lr=1e-5,
        schedule="cosine",
        floor=0.1,
        warmup=config.steps // 10,
        weight_decay=0.1,
    )
    if small and not data:
        config.data.held_out = ["novels:only=persuasion"]
        config.holdout = dict(source="novels:only=persuasion")
        config.eval_every, config.eval_batches = config.steps, 4
    return config
