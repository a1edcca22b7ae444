"""Locret (arXiv 2410.01805): heads that say which tokens answers will look at.

lclm train --config=configs/locret_heads.py:model=FOLDER     (under an A800 hour)
lclm train --config=configs/locret_heads.py:size=cpu         (SmolLM2, minutes)

The model is frozen; targets are computed from it in the same pass. The result is
extra.safetensors beside the model. The paper trains on LongAlpaca
(`data=chat:path=...`), here are passkeys by default. Numbers: not measured yet.
"""

import ml_collections


def get_config(size="full", model="", data="", length=0):
    """Rows of `length` tokens, 10240 in the paper."""
    small = size == "cpu"
    config = ml_collections.ConfigDict()
    config.name = "locret-heads"
    config.title = "Locret retaining heads"
    config.length = length or (512 if small else 10240)
    config.model = dict(source=model or ("smollm2-135m" if small else "llama-3-8b"))
    config.objective = f"locret_heads:hidden={128 if small else 1024}"
    config.data = dict(source=data or "passkeys:book=novels,keys=4,words=8")
    config.steps = 20 if small else 3000
    config.batch = 1
    config.compute = "float32" if small else "bfloat16"
    config.remat = dict(kind="attention")
    config.optimizer = dict(
        lr=5e-4,
        schedule="linear",
        warmup=config.steps * 2 // 3,
        floor=0.0,
        clip_norm=None,
        clip_value=0.5,
    )
    return config
