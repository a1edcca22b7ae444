"""A small model over bytes, and its extension from 256 to 1,024 bytes.

    lclm train --config=experiments/s2_attention/train.py:seed=1
    lclm train --config=experiments/s2_attention/train.py:how=plus,start=FOLDER/model

Without `start` the base model is trained. `how` says what is trained: `all` parameters,
`lora` adapters on q, k, v, o alone, or `plus` adapters, embedding and norms (LongLoRA).
`pattern`: the attention of training; positions are interpolated (factor 4), and the
stored model always has full attention.
"""

import ml_collections

CHANGES = dict(
    all={},
    lora=dict(lora=dict(rank=8, alpha=16.0)),
    plus=dict(
        lora=dict(rank=8, alpha=16.0), trains=(r"^embed/", r"norm"), head="frozen"
    ),
)


def get_config(
    how="all", pattern="", start="", seed=0, steps=40, batch=2, length=1024, lr=1e-3
):
    """`start`: the folder of a trained base model; without it `steps` are 120."""
    config = ml_collections.ConfigDict()
    config.data = dict(
        source="novels", held_out=["novels:only=persuasion"], packing="concat"
    )
    config.compute = "float32"
    config.seed = seed
    if not start:
        config.name, config.title = f"base-{seed}", f"Base model, seed {seed}"
        config.model = dict(source="mini-bytes", scratch=True, tokenizer="bytes")
        config.steps, config.batch, config.length = 120, 8, 256
        config.optimizer = dict(lr=4e-3, warmup=20, weight_decay=0.1)
        return config
    config.name = f"{how}-{seed}"
    config.title = f"Extended: {how} {pattern}, seed {seed}"
    config.model = dict(
        source=start,
        rope=dict(kind="linear", factor=4.0, context=length),
        pattern=pattern or None,
        **CHANGES[how],
    )
    config.steps, config.batch, config.length = steps, batch, length
    config.optimizer = dict(
        lr=lr, schedule="constant", warmup=4, weight_decay=0.0, b2=0.99
    )
    return config
