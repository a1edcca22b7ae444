"""Infini-attention's memory: what it adds to segments of 64, and how gates part.

    lclm run --config=experiments/infini/config.py
    python experiments/infini/gates.py runs/infini

Models of 0.2M parameters trained on novels in rows of 256 bytes: segments with a
memory, a window of 64 without one, and full attention (arXiv 2404.07143). README.md
has what came out.
"""

import ml_collections

TRAIN = "experiments/infini/train.py:model={},seed={},steps={}"
MODELS = ("infini", "segment", "full")
READING = "Reading a novel that no model was trained on"


def get_config(seeds=3, steps=120, length=1024, documents=3):
    """`length`: bytes of each of `documents` pieces; training saw 256 at a time."""
    config = ml_collections.ConfigDict()
    config.name = "infini"
    config.title = "A compressive memory beside segments"
    config.size = "smoke"
    names = {m: [f"{m} {s}" for s in range(seeds)] for m in MODELS}
    config.models = [
        dict(name=name, train=TRAIN.format(model, seed, steps))
        for model, its in names.items()
        for seed, name in enumerate(its)
    ]
    config.stages = [
        dict(
            eval="perplexity",
            title=READING,
            source="austen:novel=persuasion",
            length=length,
            documents=documents,
            splits=[64, 256],
            bucket=64,
        )
    ]

    def claim(high, span, says, paper):
        return dict(
            says=says,
            paper="arXiv 2404.07143: " + paper,
            stage=READING,
            measure="nll",
            span=span,
            seed="model",
            low=dict(model=names["infini"]),
            high=dict(model=names[high]),
        )

    config.claims = [
        claim(
            "segment",
            [64, 256],
            "A memory is better than a window of the segment's size alone.",
            "PG19 9.65 against 11.88 of Transformer-XL",
        ),
        claim(
            "full",
            [256, length],
            "Past the trained length the memory is better than full attention.",
            "passkeys at 1M tokens after training at 5k",
        ),
    ]
    return config
