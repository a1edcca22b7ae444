"""LongGen (arXiv 2410.01485): full attention in the middle third, sparse around.

lclm train --config=configs/longgen.py:model=FOLDER     (7B; 256 A100 in the paper)
lclm train --config=configs/longgen.py:size=cpu         (SmolLM2, minutes)

`hybrid` is longgen (sinks and a window), longgen_blocks (block-sparse), or infini (a
compressive memory, arXiv 2404.07143). Weights are kept; theta is raised.
Numbers: not measured yet (paper: 5B tokens of 128k, cache -62%).
"""

import ml_collections


def get_config(size="full", model="", data="", length=0, hybrid="longgen", theta=5e6):
    """`theta` 0 leaves the model's own; the paper does not say its value."""
    small = size == "cpu"
    config = ml_collections.ConfigDict()
    config.name = hybrid.partition(":")[0]
    config.title = f"Continued training as {hybrid}"
    config.length = length or (1024 if small else 131072)
    sizes = {
        "longgen": "sinks=16,window=112",
        "longgen_blocks": "block=64,local=1,stride=4",
        "infini": "segment=256",
    }
    if small and hybrid in sizes:
        hybrid = f"{hybrid}:{sizes[hybrid]}"
    rope = dict(context=config.length) | (dict(theta=theta) if theta else {})
    config.model = dict(
        source=model or ("smollm2-135m" if small else "llama-2-7b"),
        hybrid=hybrid,
        rope=rope,
    )
    config.data = dict(source=data or "novels")
    config.steps = 10 if small else 1250
    config.batch = 1 if small else 32
    config.accumulate = 1 if small else 32
    config.compute = "float32" if small else "bfloat16"
    config.remat = dict(kind="attention")
    gates = dict(match=r"infini/gate$", lr=50.0, weight_decay=0.0)
    config.optimizer = dict(
        lr=2e-5, schedule="cosine", warmup=config.steps // 20, groups=[gates]
    )
    if small and not data:
        config.data.held_out = ["novels:only=persuasion"]
        config.holdout = dict(source="novels:only=persuasion")
        config.eval_every, config.eval_batches = config.steps, 4
    return config
