"""One architecture from scratch on novels, as bytes, at the FLOPs of the others.

    lclm train --config=experiments/architectures/train.py:model=mamba,seed=1

Steps follow from `lclm.train.metrics.step_flops` (forward and backward: 6 a matrix
weight and token, 12 a visible pair and head width; scans and convolutions uncounted).
"""

import ml_collections

# MFLOP a byte in rows of 256, and so the steps of each that cost what 120 of llama do.
MFLOP = dict(llama=1.674, mamba=1.648, jamba=1.740, megalodon=1.531)
PRESETS = dict(
    llama="mini-bytes",
    mamba="mini-bytes-mamba",
    jamba="mini-bytes-jamba",
    megalodon="mini-bytes-megalodon",
)


def get_config(model="llama", seed=0, steps=120, length=256, batch=8, lr=4e-3):
    """`model`: llama, mamba, jamba or megalodon; `steps`: of llama."""
    config = ml_collections.ConfigDict()
    config.name = f"{model}-{seed}"
    config.title = f"{model} over bytes, seed {seed}"
    config.model = dict(source=PRESETS[model], scratch=True, tokenizer="bytes")
    config.data = dict(
        source="novels", held_out=["novels:only=persuasion"], packing="concat"
    )
    config.steps = round(steps * MFLOP["llama"] / MFLOP[model])
    config.batch, config.length = batch, length
    config.compute = "float32"
    config.optimizer = dict(lr=lr, warmup=20, weight_decay=0.1)
    config.seed = seed
    return config
