"""Where LongGen's full attention layers stand: loss by placement.

    lclm run --config=experiments/longgen/config.py

Six-layer models of 0.3M parameters, trained on novels in rows of 512 bytes, with two
full layers in the middle, at the bottom, at the top or spread, and with six or none
(arXiv 2410.01485). README.md has what came out.
"""

import ml_collections

TRAIN = "experiments/longgen/train.py:place={},seed={},steps={}"
PLACES = ("middle", "bottom", "top", "spread", "full", "sparse")
READING = "Reading a novel that no model was trained on"


def get_config(seeds=3, steps=80, length=512, documents=6):
    """`length`: bytes of each of `documents` pieces; positions past 64 decide."""
    config = ml_collections.ConfigDict()
    config.name = "longgen"
    config.title = "The place of full attention layers"
    config.size = "smoke"
    names = {p: [f"{p} {s}" for s in range(seeds)] for p in PLACES}
    config.models = [
        dict(name=name, train=TRAIN.format(place, seed, steps))
        for place, its in names.items()
        for seed, name in enumerate(its)
    ]
    config.stages = [
        dict(
            eval="perplexity",
            title=READING,
            source="austen:novel=persuasion",
            length=length,
            documents=documents,
            splits=[64],
            bucket=64,
        )
    ]

    def claim(low, high, says, paper, margin=0.0):
        return dict(
            says=says,
            paper="arXiv 2410.01485: " + paper,
            stage=READING,
            measure="nll",
            span=[64, length],
            seed="model",
            low=dict(model=names[low]),
            high=dict(model=names[high]),
            margin=margin,
        )

    config.claims = [
        claim(
            "middle",
            other,
            f"Full layers in the middle are better than {words}.",
            "the middle is the best place (its ablation, 7B)",
        )
        for other, words in (
            ("bottom", "at the bottom"),
            ("top", "at the top"),
            ("spread", "spread over the depth"),
        )
    ] + [
        claim(
            "middle",
            "sparse",
            "A third of full layers is better than none.",
            "needles 100% against 28% with sinks and a window alone",
        ),
        claim(
            "middle",
            "full",
            "A third of full layers is within 0.02 nats of full attention.",
            "RULER 0.38 against 0.41, MMLU 0.415 against 0.419",
            0.02,
        ),
    ]
    return config
