"""Fine-tuning under changed rotary embeddings: YaRN (arXiv 2309.00071), PI, NTK.

lclm train --config=configs/yarn_finetune.py:model=FOLDER              (7B)
lclm train --config=configs/yarn_finetune.py:size=cpu,rope=linear      (SmolLM2)

`rope` is yarn, linear (PI, arXiv 2306.15595), ntk, or default with a raised `theta`.
Cost and perplexity: not measured yet (paper: 7B, factor 16, 400 steps; Proof-pile at
64k 2.42).
"""

import ml_collections


def get_config(
    size="full", model="", data="", length=0, rope="yarn", factor=16.0, theta=0.0
):
    """`factor` times the trained length; `theta` alone with rope=default."""
    small = size == "cpu"
    config = ml_collections.ConfigDict()
    config.name = f"finetune-{rope}"
    config.title = f"Fine-tuning with {rope} positions"
    config.length = length or (2048 if small else 65536)
    change = dict(context=config.length)
    if rope != "default":
        change |= dict(kind=rope, factor=factor)
    if theta:
        change |= dict(theta=theta)
    config.model = dict(
        source=model or ("smollm2-135m" if small else "llama-2-7b"), rope=change
    )
    config.data = dict(source=data or "novels")
    config.steps = 10 if small else 400
    config.batch = 1 if small else 64
    config.accumulate = 1 if small else 8
    config.compute = "float32" if small else "bfloat16"
    config.remat = dict(kind="attention")
    config.optimizer = dict(
        lr=2e-5, schedule="constant", warmup=0 if small else 20, weight_decay=0.0
    )
    if small and not data:
        config.data.held_out = ["novels:only=persuasion"]
        config.holdout = dict(source="novels:only=persuasion")
        config.eval_every, config.eval_batches = config.steps, 4
    return config
