"""ProLong (arXiv 2410.02660), instructions: short chats, prompts not predicted.

lclm train --config=configs/prolong_sft.py:model=FOLDER,data=chat:path=chats.jsonl
lclm train --config=configs/prolong_sft.py:size=cpu,data=chat:path=chats.jsonl

UltraChat alone in the paper, 1B tokens packed into 64k rows. A line of the file is one
conversation; only what the assistant says is predicted. Numbers: not measured yet.
"""

import ml_collections


def get_config(size="full", model="", data="", start=""):
    """`data` is one source in place of the mixture."""
    small = size == "cpu"
    config = ml_collections.ConfigDict()
    config.name = "prolong-sft"
    config.title = "ProLong, instructions"
    config.length = 1024 if small else 65536
    config.model = dict(
        source=model or ("smollm2-135m" if small else "llama-3-8b"),
        rope=dict(theta=1.28e8, context=config.length),
    )
    config.data = dict(source=data or "chat:path=chats.jsonl")
    config.steps = 10 if small else 250
    config.batch = 1 if small else 64
    config.accumulate = 1 if small else 64
    config.compute = "float32" if small else "bfloat16"
    config.remat = dict(kind="attention")
    config.optimizer = dict(
        lr=2e-5,
        schedule="cosine",
        floor=0.1,
        warmup=config.steps // 20,
        weight_decay=0.1,
    )
    config.start_from = start
    if small:
        config.holdout = dict(source="novels:only=persuasion")
        config.eval_every, config.eval_batches = config.steps, 4
    return config
