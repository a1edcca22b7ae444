"""Second stage of LongLoRA on SmolLM2: the adapter learns to answer from far back.

    lclm train --config=experiments/longlora/answer.py --workdir=runs/longlora-answer

Goes on from `train.py`'s run for 30 steps, the paper's supervised stage: full attention
(a question in its shifted group would not see a key in the first half of a row), half
the rows made-up keys hidden in novels, half the books of before. Positions, adapters
and what is trained stay as they were. Minutes on 2 CPU cores: about 20.
"""

import ml_collections


def get_config(start="runs/longlora", rope="yarn", steps=30, length=4096, lr=2e-4):
    """`start`: the finished run of `train.py`, with the same `rope`."""
    config = ml_collections.ConfigDict()
    config.name = f"longlora-{rope}-answer"
    config.title = "SmolLM2 answers past 8k"
    config.length = length
    config.start_from = start
    config.model = dict(
        source="smollm2-135m",
        rope=dict(kind=rope, factor=4.0, context=32768),
        lora=dict(rank=16, alpha=32.0),
        trains=(r"norm",),
    )
    keys = "passkeys:book=novels,keys=12"
    books = [("novels", 30.0), ("kjv_books", 10.0), ("stdlib:depth=1", 10.0)]
    books += [(f"{keys},words=3", 25.0), (f"{keys},words=5,kind=digits", 25.0)]
    config.data = dict(
        mixture=[dict(source=source, share=share) for source, share in books],
        packing="concat",
        held_out=["novels:only=persuasion"],
    )
    config.steps = steps
    config.batch = 1
    config.compute = "float32"
    config.remat = dict(kind="none")
    config.checkpoints = dict(every=10)
    config.log_every = 1
    config.optimizer = dict(
        lr=lr, schedule="linear", floor=0.0, warmup=2, weight_decay=0.0, b2=0.99
    )
    return config
