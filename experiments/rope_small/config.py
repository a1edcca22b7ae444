"""Stretched rotary embeddings far past the trained length, on models trained here.

    lclm run --config=experiments/rope_small/config.py

Three models of 0.2M parameters, trained on 1.2 MB of novels in rows of 256
bytes, read another novel in pieces of 1,024, their rotary embedding left alone or
stretched fourfold. No weight is trained for it. About 8 minutes of 2 cores. README.md
has what came out.
"""

import ml_collections

TRAIN = "experiments/infini/train.py:model=full,seed={},steps={}"
KINDS = {
    "PI": "linear:factor=4",
    "NTK": "ntk:factor=4",
    "dynamic NTK": "dynamic:factor=4",
    "YaRN": "yarn:factor=4",
}
PLAIN, TRAINED = "plain {}", 256
READING = "Reading 1,024 bytes of a novel"


def get_config(seeds=3, steps=600, length=1024, documents=4):
    """`length`: bytes of each of `documents` pieces."""
    config = ml_collections.ConfigDict()
    config.name = "rope_small"
    config.title = "Rotary embeddings stretched fourfold, untrained"
    config.size = "smoke"
    plain = [PLAIN.format(s) for s in range(seeds)]
    config.models = [
        dict(name=name, train=TRAIN.format(s, steps)) for s, name in enumerate(plain)
    ]
    config.models += [
        dict(name=f"{kind} {s}", source=f"{{models}}/plain-{s}/model", rope=rope)
        for kind, rope in KINDS.items()
        for s in range(seeds)
    ]
    config.stages = [
        dict(
            eval="perplexity",
            title=READING,
            source="austen:novel=persuasion",
            length=length,
            documents=documents,
            splits=[TRAINED],
            bucket=64,
        )
    ]

    def claim(says, paper, low, high, span, margin=0.0):
        sides = [[f"{kind} {s}" for s in range(seeds)] for kind in (low, high)]
        return dict(
            says=says,
            paper=paper,
            stage=READING,
            measure="nll",
            span=span,
            seed="model",
            paired=True,
            low=dict(model=sides[0]),
            high=dict(model=sides[1]),
            margin=margin,
        )

    past, inside = [TRAINED, length], [0, TRAINED]
    yarn = "arXiv 2309.00071"
    pi = "arXiv 2306.15595"
    config.claims = [
        claim("Past its trained length YaRN reads on where the plain model fails.",
              yarn, "YaRN", "plain", past),
        claim("There NTK scaling is better than PI.", yarn, "NTK", "PI", past),
        claim("There YaRN is better than NTK scaling.", yarn, "YaRN", "NTK", past),
        claim("There dynamic NTK is better than the plain model.", yarn,
              "dynamic NTK", "plain", past),
        claim("There PI is better than the plain model.",
              f"{pi}, abstract: extrapolation ruins attention", "PI", "plain", past),
        claim("Inside the trained length PI without training costs loss.",
              f"{pi}: fine-tuning wins it back", "plain", "PI", inside),
    ]  # fmt: skip
    return config
