"""ProLong (arXiv 2410.02660), stage 2: 512k tokens, theta 1.28e8, optimizer carried.

lclm train --config=configs/prolong_stage2.py:model=FOLDER     (8B; 12.2k H100 hours)
lclm train --config=configs/prolong_stage2.py:size=cpu         (after stage 1, minutes)

Begins with the parameters and the moments of `start` (the folder of stage 1); the
schedule begins anew. Numbers: not measured yet.
"""

import ml_collections


def get_config(size="full", model="", data="", start="runs/prolong-stage1"):
    """`data` is one source in place of the mixture."""
    small = size == "cpu"
    config = ml_collections.ConfigDict()
    config.name = "prolong-stage2"
    config.title = "ProLong, stage 2"
    config.length = 2048 if small else 524288
    config.model = dict(
        source=model or ("smollm2-135m" if small else "llama-3-8b"),
        rope=dict(theta=1.28e8, context=config.length),
    )
    config.data = dict(source=data or "novels")
    config.steps = 10 if small else 2500
    config.batch = 1 if small else 16
    config.accumulate = 1 if small else 16
    config.compute = "float32" if small else "bfloat16"
    config.remat = dict(kind="attention")
    config.optimizer = dict(
        lr=1e-5,
        schedule="cosine",
        floor=0.1,
        warmup=config.steps // 10,
        weight_decay=0.1,
    )
    config.start_from = start
    config.carry_optimizer = bool(start)
    if small and not data:
        config.data.held_out = ["novels:only=persuasion"]
        config.holdout = dict(source="novels:only=persuasion")
        config.eval_every, config.eval_batches = config.steps, 4
    return config
