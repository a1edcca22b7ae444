"""Rotary embeddings stretched without training: PI, NTK, dynamic NTK, YaRN by length.

    lclm run --config=experiments/rope/config.py

Took 34 minutes of 2 CPU cores beside other runs.
Expected: past the trained length the plain model's loss rises; PI (arXiv 2306.15595)
costs loss everywhere until it is trained; NTK scaling costs less, and YaRN (arXiv
2309.00071) is the best past it. Dynamic NTK is the plain model to 8,192 tokens; at 1.5
times that its angles are those of NTK scaling by 2.
"""

import ml_collections

PAST = 10240  # models read on a little past their length before they fail
NOVELS = ("emma", "persuasion", "pride and prejudice")
KINDS = {
    "plain": "",
    "PI": "linear:factor=2",
    "NTK": "ntk:factor=2",
    "dynamic NTK": "dynamic:factor=2",
    "YaRN": "yarn:factor=2",
}


def get_config(model="smollm2-135m", length=12288, trained=8192):
    """`length`: tokens read of each text, beyond `trained`."""
    config = ml_collections.ConfigDict()
    config.name = "rope"
    config.title = "Rotary embeddings stretched, untrained"
    config.about = (
        "A small model that was trained on 8k tokens reads three novels past that with "
        "full attention, its rotary embedding left alone or stretched twofold in one "
        "of four ways. No weight is trained."
    )
    config.size = "smoke"
    config.quantize = "int8"
    config.models = [
        dict(name=name, source=model, **({"rope": rope} if rope else {}))
        for name, rope in KINDS.items()
    ]
    config.stages = [
        dict(
            eval="perplexity",
            title=novel.capitalize(),
            source=f"austen:novel={novel}",
            length=length,
            splits=[2048, trained, PAST],
            readings=[dict(cache="full")],
        )
        for novel in NOVELS
    ]
    past, inside = [PAST, length], [1024, trained]

    def claim(says, paper, low, high, span, **more):
        sides = dict(low=dict(model=low), high=dict(model=high))
        told = dict(measure="nll", stage=[n.capitalize() for n in NOVELS], seed="stage")
        return {**told, **sides, "says": says, "paper": paper, "span": span, **more}

    config.claims = [
        claim("Past its trained length YaRN reads on where the plain model fails.",
              "arXiv 2309.00071",
              "YaRN", "plain", past),
        claim("Without training PI is worse than NTK scaling past the trained length.",
              "arXiv 2309.00071", "NTK", "PI", past),
        claim("YaRN is better than NTK scaling past the trained length.",
              "arXiv 2309.00071",
              "YaRN", "NTK", past),
        claim("There dynamic NTK reads on too.",
              "arXiv 2309.00071", "dynamic NTK", "plain", past),
        claim("Inside the trained length PI without training costs loss.",
              "arXiv 2306.15595: fine-tuning wins it back", "plain", "PI",
              inside),
        claim("Past the trained length PI without training is better than the plain "
              "model.", "arXiv 2306.15595, abstract: extrapolation ruins attention",
              "PI", "plain", past),
    ]  # fmt: skip
    return config
