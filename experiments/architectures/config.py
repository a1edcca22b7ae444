"""Mamba, Jamba, Megalodon and Llama at equal training FLOPs: loss by position.

    lclm run --config=experiments/architectures/config.py

Twelve models of 0.2M to 0.4M parameters (4 architectures, 3 seeds) are trained on
0.25 MB of novels in rows of 256 bytes and read three pieces of another novel that are
four times as long. README.md has what came out.
"""

import ml_collections

TRAIN = "experiments/architectures/train.py:model={},seed={}"
ARCHITECTURES = ("llama", "mamba", "jamba", "megalodon")
NEAR, FAR = [0, 256], [256, 1024]
READING = "Reading a novel that no model was trained on"


def get_config(seeds=3, steps=120, length=1024, documents=3):
    """`steps`: of llama, the others' cost as much; `length`: bytes of a piece."""
    config = ml_collections.ConfigDict()
    config.name = "architectures"
    config.title = "Architectures at equal training FLOPs"
    config.size = "smoke"
    names = {a: [f"{a} {s}" for s in range(seeds)] for a in ARCHITECTURES}
    config.models = [
        dict(name=name, train=TRAIN.format(a, s) + f",steps={steps}")
        for a, its in names.items()
        for s, name in enumerate(its)
    ]
    config.stages = [
        dict(
            eval="perplexity",
            title=READING,
            source="austen:novel=persuasion",
            length=length,
            documents=documents,
            splits=[256],
            bucket=64,
        )
    ]

    def claim(low, high, says, paper, span=NEAR, margin=0.0):
        return dict(
            says=says,
            paper=paper,
            stage=READING,
            measure="nll",
            span=span,
            seed="model",
            low=dict(model=names[low]),
            high=dict(model=names[high]),
            margin=margin,
        )

    config.claims = [
        claim(
            "mamba",
            "llama",
            "Mamba is at most 0.02 nats a byte above Llama at equal FLOPs.",
            "arXiv 2312.00752, figure 4: Mamba meets Transformer++ from 125M to 1.3B",
            margin=0.02,
        ),
        claim(
            "jamba",
            "llama",
            "A hybrid of Mamba and attention is below attention alone.",
            "arXiv 2403.19887, table 4: at 1.3B and 250B tokens the hybrids beat both",
        ),
        claim(
            "jamba",
            "mamba",
            "A hybrid of Mamba and attention is below Mamba alone.",
            "arXiv 2403.19887, table 4",
        ),
        claim(
            "megalodon",
            "llama",
            "Megalodon is below Llama.",
            "arXiv 2404.08801: training loss 1.70 against 1.75 (7B, 2T tokens)",
        ),
        claim(
            "mamba",
            "llama",
            "Past the trained length Mamba is below Llama.",
            "arXiv 2312.00752, table 2: induction heads to 2^20, trained at 2^8",
            span=FAR,
        ),
        claim(
            "megalodon",
            "llama",
            "Past the trained length Megalodon is below Llama.",
            "arXiv 2404.08801: perplexity falls from 4k to 2M tokens, trained at 32k",
            span=FAR,
        ),
    ]
    return config
