"""SmolLM2-135M from 8k to 32k by LongLoRA, in an hour of two CPU cores.

    lclm train --config=experiments/longlora/train.py --workdir=runs/longlora
    lclm train --config=experiments/longlora/train.py:rope=linear --workdir=runs/pi

NTK positions (factor 4), shifted groups of 2,048 in rows of 4,096 tokens, adapters of
rank 16 on q, k, v, o and the norms. `rope=linear` is the paper's position interpolation
(arXiv 2309.12307); `plus=True` also trains the embeddings.
"""

import ml_collections


def get_config(rope="ntk", steps=60, length=4096, plus=False, lr=2e-4):
    """`rope`: ntk, yarn or linear, by a factor of 4; `length`: tokens a row."""
    config = ml_collections.ConfigDict()
    config.name = f"longlora-{rope}" + ("-plus" if plus else "")
    config.title = "SmolLM2 from 8k to 32k"
    config.length = length
    config.model = dict(
        source="smollm2-135m",
        rope=dict(kind=rope, factor=4.0, context=32768),
        pattern="shifted_groups:ratio=0.5",
        lora=dict(rank=16, alpha=32.0),
        trains=(r"^embed/", r"norm") if plus else (r"norm",),
        head="frozen" if plus else None,
    )
    books = [("novels", 40.0), ("kjv_books", 15.0)]
    books += [("deb:name=anarchism,pages=*/markdown/sec*", 25.0)]
    books += [("stdlib:depth=1", 20.0)]
    config.data = dict(
        mixture=[dict(source=source, share=share) for source, share in books],
        packing="concat",
        held_out=["novels:only=persuasion"],
    )
    config.steps = steps
    config.batch = 1
    config.compute = "float32"
    config.remat = dict(kind="products")
    config.checkpoints = dict(every=15)
    config.log_every = 1
    config.optimizer = dict(
        lr=lr, schedule="linear", floor=0.0, warmup=4, weight_decay=0.0, b2=0.99
    )
    return config
