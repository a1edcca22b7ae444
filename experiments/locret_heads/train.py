"""Retaining heads for SmolLM2-135M (Locret, arXiv 2410.01805), on two CPU cores.

    lclm train --config=experiments/locret_heads/train.py --workdir=runs/locret

The model is frozen. Targets come from answers of three kinds inside Austen's novels,
Persuasion left out: digits and words hidden in the text, and sentences of a passage
that a conversation asks for. The paper has 3,000 LongAlpaca samples of up to 10,240
tokens, lr 5e-4 and a warm-up of two thirds of the run; a run this short takes more.
Answers are short here, so the query that predicts an answer's first token asks too.
"""

import ml_collections


def get_config(steps=200, length=512, hidden=256, lr=1e-3):
    """`length`: tokens a row, one row a step; `hidden`: units of a head's MLP."""
    config = ml_collections.ConfigDict()
    config.name = "locret"
    config.title = "Locret heads of SmolLM2-135M"
    config.length = length
    config.model = dict(source="smollm2-135m")
    config.objective = f"locret_heads:hidden={hidden},asks=predictors"
    config.data = dict(
        mixture=[
            dict(source="passkeys:book=novels,keys=4,words=5,kind=digits", share=35.0),
            dict(source="passkeys:book=novels,keys=2,words=6", share=30.0),
            dict(source="book_questions:book=novels,passage=1400", share=35.0),
        ],
        held_out=["novels:only=persuasion"],
    )
    config.steps = steps
    config.batch = 1
    config.compute = "float32"
    config.remat = dict(kind="none")
    config.checkpoints = dict(every=25)
    config.log_every = 1
    config.optimizer = dict(
        lr=lr,
        schedule="linear",
        warmup=steps // 10,
        floor=0.0,
        weight_decay=0.0,
        clip_norm=None,
        clip_value=0.5,
    )
    return config
