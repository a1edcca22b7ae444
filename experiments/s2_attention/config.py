"""LongLoRA's tables in small: what is trained, and under which attention.

    lclm run --config=experiments/s2_attention/config.py

Three base models of 0.2M parameters, trained on rows of 256 bytes, are extended to
1,024 by position interpolation and 40 steps: all parameters, adapters, or adapters with
embedding and norms; under full attention, shifted groups, or groups that are not
shifted (arXiv 2309.12307, tables 2, 3 and 6). All are read with full attention.
README.md has what came out.
"""

import ml_collections

FILE = "experiments/s2_attention/train.py:"
BASE = "{{models}}/base-{}/model"  # a model of this job
ARMS = {
    "all, full": "how=all",
    "all, S2 half": "how=all,pattern=shifted_groups:ratio=0.5",
    "all, S2 quarter": "how=all,pattern=shifted_groups:ratio=0.25",
    "all, S2 eighth": "how=all,pattern=shifted_groups:ratio=0.125",
    "all, quarter unshifted": "how=all,pattern=chunk:chunk=256",
    "adapters, full": "how=lora",
    "plus, full": "how=plus",
    "plus, S2 quarter": "how=plus,pattern=shifted_groups:ratio=0.25",
}
READING = "Reading 1,024 bytes of a novel with full attention"
EQUAL = 0.02


def get_config(seeds=3, length=1024, documents=4):
    config = ml_collections.ConfigDict()
    config.name = "s2_attention"
    config.title = "Shifted groups and what is trained beside the adapters"
    config.size = "smoke"
    names = {arm: [f"{arm} {s}" for s in range(seeds)] for arm in ARMS}
    config.models = [
        dict(name=f"base {s}", train=f"{FILE}seed={s}") for s in range(seeds)
    ]
    config.models += [
        dict(name=name, train=f"{FILE}{ARMS[arm]},seed={s},start={BASE.format(s)}")
        for arm, its in names.items()
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

    def claim(low, high, says, paper, margin=0.0):
        return dict(
            says=says,
            paper="arXiv 2309.12307, " + paper,
            stage=READING,
            measure="nll",
            span=[256, length],
            seed="model",
            paired=True,
            low=dict(model=names[low]),
            high=dict(model=names[high]),
            margin=margin,
        )

    config.claims = [
        claim(
            "all, full",
            "adapters, full",
            "Adapters alone do not reach full fine-tuning.",
            "table 2: 8.08 against 11.44 (7B to 32k)",
        ),
        claim(
            "plus, full",
            "adapters, full",
            "Trained embedding and norms close the gap of adapters.",
            "table 2: 8.12 against 11.44",
        ),
        claim(
            "plus, full",
            "all, full",
            f"Adapters, embedding and norms are within {EQUAL} nats of full training.",
            "table 2: 8.12 against 8.08",
            EQUAL,
        ),
        claim(
            "all, S2 quarter",
            "all, full",
            f"Shifted quarter groups train within {EQUAL} nats of full attention.",
            "table 6: groups of a half and a quarter about as full attention",
            EQUAL,
        ),
        claim(
            "all, S2 quarter",
            "all, quarter unshifted",
            "Shifted groups train a better model than groups that are not shifted.",
            "table 1: short attention falls behind as the length grows",
        ),
        claim(
            "all, S2 half",
            "all, S2 eighth",
            "Larger groups train a better model than eighths.",
            "table 6: groups of a sixth and an eighth are worse",
        ),
    ]
    return config
