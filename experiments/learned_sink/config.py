"""Pretraining with a sink token, a zero sink, learned logits or none, then streaming.

    lclm run --config=experiments/learned_sink/config.py

Twelve models of 0.2M parameters (4 kinds, 3 seeds) trained on 0.25 MB of novels in rows
of 256 bytes stream another novel with a cache of 128: 0, 1 or 4 first tokens and the
most recent ones (arXiv 2309.17453, section 3.3 and table 3). README.md has what came
out.
"""

import ml_collections

TRAIN = "experiments/learned_sink/train.py:sink={},seed={},steps={}"
KINDS = "none+token+zero+learned"
CACHE, SINKS = 128, (0, 1, 4)
READING = "Streaming a novel that no model was trained on"
PAPER = "arXiv 2309.17453, table 3 (160M, 1,024 tokens of cache): "


def label(sinks):
    """What the tables call a cache."""
    return f"{sinks} + {CACHE - sinks}"


def get_config(seeds=3, steps=120, length=1024, documents=2, kinds=KINDS):
    """`length`: bytes of each of `documents` pieces; positions past 128 decide.

    `kinds`: some of them, joined by +; claims about others are left out.
    """
    kinds = kinds.split("+")
    config = ml_collections.ConfigDict()
    config.name = "learned_sink"
    config.title = "Pretraining with attention sinks"
    config.size = "smoke"
    names = {k: [f"{k} {s}" for s in range(seeds)] for k in kinds}
    config.models = [
        dict(name=name, train=TRAIN.format(kind, seed, steps))
        for kind, its in names.items()
        for seed, name in enumerate(its)
    ]
    config.stages = [
        dict(
            eval="perplexity",
            title=READING,
            source="austen:novel=persuasion",
            length=length,
            documents=documents,
            splits=[CACHE],
            bucket=64,
            readings=[
                dict(
                    cache=f"streaming:sinks={sinks},window={CACHE - sinks}",
                    label=label(sinks),
                    chunk=CACHE,
                )
                for sinks in SINKS
            ],
        )
    ]

    def claim(low, high, says, paper):
        (kind, sinks), (other, others) = low, high
        return dict(
            says=says,
            paper=paper,
            stage=READING,
            measure="nll",
            span=[CACHE, length],
            seed="model",
            low=dict(model=names[kind], label=label(sinks)),
            high=dict(model=names[other], label=label(others)),
        )

    claims = [
        (
            ("none", 4),
            ("none", 0),
            "Without a trained sink, first tokens are needed as sinks.",
            PAPER + "18.05 with 4, 27.87 with none",
        ),
        (
            ("token", 1),
            ("token", 0),
            "A model trained with a sink token cannot do without it.",
            PAPER + "18.01 with it, 1235 with none",
        ),
        (
            ("token", 1),
            ("none", 1),
            "The sink token alone serves better than one ordinary first token.",
            PAPER + "18.01 against 18.49",
        ),
        (
            ("zero", 4),
            ("zero", 0),
            "A zero sink still needs first tokens.",
            PAPER + "18.01 with 4, 29,214 with none",
        ),
        (
            ("learned", 0),
            ("none", 0),
            "With learned logits a window alone reads better than without.",
            "not in the paper: the later form of the idea (a logit a head)",
        ),
    ]
    config.claims = [
        claim(low, high, says, paper)
        for low, high, says, paper in claims
        if {low[0], high[0]} <= set(kinds)
    ]
    return config
