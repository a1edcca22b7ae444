"""ProLong's mixture in small: long texts of two kinds, or short ones alone.

    lclm run --config=experiments/prolong_mixture/config.py

Three base models of 0.2M parameters, trained on short texts in rows of 256 bytes, go on
in rows of 1,024 with a raised theta on four mixtures, and read the King James Bible,
which is in none of them. README.md has what came out.
"""

import ml_collections

FILE = "experiments/prolong_mixture/train.py:"
BASE = "{{models}}/base-{}/model"  # a model of this job
MIXES = ("short", "books", "repos", "both")
READING = "Reading 1,024 bytes of a text of another kind"


def get_config(seeds=3, length=1024, documents=4):
    config = ml_collections.ConfigDict()
    config.name = "prolong_mixture"
    config.title = "Mixtures of long and short texts"
    config.size = "smoke"
    names = {mix: [f"{mix} {s}" for s in range(seeds)] for mix in MIXES}
    config.models = [
        dict(name=f"base {s}", train=f"{FILE}seed={s}") for s in range(seeds)
    ]
    config.models += [
        dict(name=name, train=f"{FILE}mix={mix},seed={s},start={BASE.format(s)}")
        for mix, its in names.items()
        for s, name in enumerate(its)
    ]
    config.stages = [
        dict(
            eval="perplexity",
            title=READING,
            source="kjv",
            length=length,
            documents=documents,
            splits=[256],
            bucket=64,
        )
    ]

    def claim(low, high, says, paper):
        return dict(
            says=says,
            paper="arXiv 2410.02660, ablations (long-context average): " + paper,
            stage=READING,
            measure="nll",
            span=[256, length],
            seed="model",
            paired=True,
            low=dict(model=names[low]),
            high=dict(model=names[high]),
        )

    config.claims = [
        claim(
            "both",
            "short",
            "Past the base's length, 60% long texts are better than short ones alone.",
            "60% long data is best",
        ),
        claim(
            "both",
            "books",
            "Books and repositories together are better than books.",
            "54.6 against 53.8",
        ),
        claim(
            "both",
            "repos",
            "Books and repositories together are better than repositories.",
            "54.6 against 52.3",
        ),
    ]
    return config
