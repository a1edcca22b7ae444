"""A small model over bytes: short texts, then a mixture in rows four times longer.

    lclm train --config=experiments/prolong_mixture/train.py:seed=1
    lclm train --config=experiments/prolong_mixture/train.py:mix=both,start=FOLDER/model

Without `start` the base model is trained on introductions of Wikipedia articles in rows
of 256 bytes. `mix` then is ProLong's (arXiv 2410.02660) in shares of rows: 60% long
texts (books, repositories, or half of each) with 40% short ones, or short ones alone.
"""

import ml_collections

SHORT = "wikipedia_intros"
BOOKS, CODE = "novels", "stdlib:depth=1"
MIXES = dict(
    short=[(SHORT, 100.0)],
    books=[(BOOKS, 60.0), (SHORT, 40.0)],
    repos=[(CODE, 60.0), (SHORT, 40.0)],
    both=[(BOOKS, 30.0), (CODE, 30.0), (SHORT, 40.0)],
)


def get_config(mix="both", start="", seed=0, steps=60, batch=2, length=1024, lr=1e-3):
    """`start`: the folder of a trained base model."""
    config = ml_collections.ConfigDict()
    config.compute = "float32"
    config.seed = seed
    if not start:
        config.name, config.title = f"base-{seed}", f"Base model, seed {seed}"
        config.model = dict(source="mini-bytes", scratch=True, tokenizer="bytes")
        config.data = dict(source=SHORT)
        config.steps, config.batch, config.length = 120, 8, 256
        config.optimizer = dict(lr=4e-3, warmup=20, weight_decay=0.1)
        return config
    config.name = f"{mix}-{seed}"
    config.title = f"Mixture: {mix}, seed {seed}"
    config.model = dict(source=start, rope=dict(theta=8e4, context=length))
    mixture = [dict(source=source, share=share) for source, share in MIXES[mix]]
    config.data = dict(mixture=mixture)
    config.steps, config.batch, config.length = steps, batch, length
    config.optimizer = dict(
        lr=lr, schedule="cosine", floor=0.1, warmup=6, weight_decay=0.1
    )
    return config
