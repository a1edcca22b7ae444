"""What trained retaining heads are worth: Locret beside other caches of equal bytes.

    lclm run --config=experiments/locret_heads/evaluate.py
    lclm run --config=experiments/locret_heads/evaluate.py:length=4096

Passkeys in prompts of `length` tokens, then the loss on Persuasion, which the heads'
training did not see. Every evicting cache is bounded throughout (at=chunk, 512 tokens
a call); StreamingLLM gets the bytes of their scores as more tokens. A finished
measurement is kept when the run is interrupted.
"""

import ml_collections


def get_config(length=2048, budget=512, perplexity=True, heads=""):
    """`heads`: a file of retaining heads instead of those that come with lclm."""
    own = f",heads={heads}" if heads else ""
    caches = [
        "full",
        f"streaming:sinks=4,window={budget * 259 // 256 - 4}",
        f"h2o:budget={budget}",
        f"locret:budget={budget},heads=random:0",
        f"locret:budget={budget},heads=random:1",
        f"locret:budget={budget}{own}",
    ]
    config = ml_collections.ConfigDict()
    config.name = f"locret-{length}"
    config.title = "Locret on SmolLM2-135M"
    config.model = "smollm2-135m"
    config.quantize = "int8"
    config.stages = [
        dict(
            eval="passkey",
            lengths=[length],
            depths=[0.1, 0.3, 0.5, 0.7, 0.9],
            caches=caches,
        )
    ]
    if perplexity:
        config.stages += [
            dict(
                eval="perplexity",
                source="austen:novel=persuasion",
                length=3072,
                splits=[budget, 1536],
                readings=[dict(cache=cache) for cache in caches],
            )
        ]
    return config
