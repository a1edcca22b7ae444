"""256k tokens of a 1B model on one 141 GB GPU: Llama-3.2-1B, all weights trained.

lclm train --config=configs/long_1b.py:model=FOLDER
lclm train --config=configs/long_1b.py:size=cpu         (SmolLM2, minutes)
lclm plan --config=configs/long_1b.py --topology=h200   (on any machine, a minute)

The plan gives 13.8 GiB of state and 60.3 GiB of temporaries of an H200's 140.4 GiB, and
at least 15.6 s a step at the bfloat16 peak. No step was run on one.
"""

import ml_collections


def get_config(
    size="full", model="", data="", length=0, remat="attention", loss_chunk=2048
):
    """One row of `length` tokens a step; `remat` is a preset of lclm.models.remat."""
    small = size == "cpu"
    config = ml_collections.ConfigDict()
    config.name = "long-1b"
    config.title = "256k tokens of a 1B model on one GPU"
    config.length = length or (2048 if small else 262144)
    config.model = dict(
        source=model or ("smollm2-135m" if small else "llama-3.2-1b"),
        rope=dict(theta=8e6, context=config.length),
    )
    config.data = dict(source=data or "novels")
    config.steps = 10 if small else 1000
    config.batch = 1
    config.compute = "float32" if small else "bfloat16"
    config.remat = dict(kind=remat)
    config.loss_chunk = loss_chunk
    config.optimizer = dict(lr=1e-5, warmup=config.steps // 10, floor=0.1)
    return config
