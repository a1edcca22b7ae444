"""LongLoRA (arXiv 2309.12307): a model extended to 32k by shifted groups and adapters.

lclm train --config=configs/longlora.py:model=FOLDER     (7B; 8 x 80 GB in the paper)
lclm train --config=configs/longlora.py:size=cpu         (SmolLM2 to 2k rows, minutes)

Trained are adapters on q, k, v, o, the embeddings and the norms (`plus=False`: adapters
and norms, which is what a small file can hold). Attention of training sees groups of a
quarter of the row; the stored model is the merged one with full attention.
Cost and perplexity: not measured yet (paper: 7B at 32k, PG19 8.12; full training 8.08).
"""

import ml_collections


def get_config(size="full", model="", data="", length=0, factor=4.0, plus=True):
    """`factor` times the trained length, by position interpolation."""
    small = size == "cpu"
    config = ml_collections.ConfigDict()
    config.name = "longlora"
    config.title = "LongLoRA"
    config.length = length or (2048 if small else 32768)
    trains = (r"^embed/", r"norm") if plus else (r"norm",)
    config.model = dict(
        source=model or ("smollm2-135m" if small else "llama-2-7b"),
        rope=dict(kind="linear", factor=factor, context=config.length),
        pattern="shifted_groups:ratio=0.25",
        lora=dict(rank=8, alpha=16.0),
        trains=trains,
        head="frozen" if plus else None,
    )
    config.data = dict(source=data or "novels")
    config.steps = 10 if small else 1000
    config.batch = 1 if small else 64
    config.accumulate = 1 if small else 8
    config.compute = "float32" if small else "bfloat16"
    config.remat = dict(kind="attention")
    config.optimizer = dict(
        lr=2e-5,
        schedule="constant",
        warmup=0 if small else 20,
        weight_decay=0.0,
        b2=0.999,
    )
    if small and not data:
        config.data.held_out = ["novels:only=persuasion"]
        config.holdout = dict(source="novels:only=persuasion")
        config.eval_every, config.eval_batches = config.steps, 4
    return config
