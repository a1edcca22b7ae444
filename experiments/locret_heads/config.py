"""What trained retaining heads are worth: Locret beside other caches of equal bytes.

    lclm run --config=experiments/locret_heads/config.py
    lclm run --config=experiments/locret_heads/config.py:beside=False
    lclm run --config=experiments/locret_heads/config.py:length=2048,budget=512

Passkeys and needles in contexts of `length` tokens that are read, and compressed,
before the question is known. A seed is a draw of five keys and of their depths, one in
each fifth of the context; of needles a draw of five facts. Every evicting cache is
bounded throughout (at=chunk, 512 tokens a call); StreamingLLM gets the bytes of the
scores as more tokens. About 15 minutes of 2 cores. With perplexity=True also the loss
on three pieces of Persuasion, which the heads' training did not see; beside=False
leaves out StreamingLLM and the full cache. A finished measurement is kept when the run
is interrupted.
"""

import ml_collections

PAPER = "arXiv 2410.01805"


def get_config(
    length=1024, budget=256, trials=3, perplexity=False, beside=True, heads=""
):
    """`heads`: a file of retaining heads instead of those that come with lclm."""
    own = f",heads={heads}" if heads else ""
    locret = f"locret:budget={budget}{own}"
    streaming = f"streaming:sinks=4,window={budget * 259 // 256 - 4}"
    h2o, snapkv = f"h2o:budget={budget}", f"snapkv:budget={budget}"
    random = [f"locret:budget={budget},heads=random:{seed}" for seed in range(3)]
    caches = [locret, h2o, snapkv, *random, *([streaming, "full"] if beside else [])]
    config = ml_collections.ConfigDict()
    config.name = f"locret-{length}"
    config.title = "Locret on SmolLM2-135M"
    config.model = "smollm2-135m"
    config.quantize = "int8"
    asked = dict(lengths=[length], trials=trials, caches=caches, questions="hidden")
    config.stages = [
        dict(eval="passkey", title="Passkeys", bins=5, **asked),
        dict(eval="needle", title="Needles", at=[0.1, 0.3, 0.5, 0.7, 0.9], **asked),
    ]
    both = ["Passkeys", "Needles"]
    found = dict(stage=both, measure="score", high=dict(cache=locret))
    config.claims = [
        dict(
            says="Trained heads keep what heads that were not trained lose.",
            paper=f"{PAPER}: average of infinite-bench 34.7 against 4.9 (Phi-3-mini)",
            low=dict(cache=random),
            **found,
        ),
        dict(
            says="Locret finds more than H2O in chunks.",
            paper=f"{PAPER}: R.Number 97.5 against 3.4 (Phi-3-mini)",
            low=dict(cache=h2o),
            **found,
        ),
        dict(
            says="Locret finds more than SnapKV in chunks.",
            paper=f"{PAPER}: R.Number 97.5 against 2.5 (Phi-3-mini)",
            low=dict(cache=snapkv),
            **found,
        ),
    ]
    if beside:
        config.claims += [
            dict(
                says="Locret finds more than a window with sinks.",
                paper="not compared there; equal bytes here",
                low=dict(cache=streaming),
                **found,
            ),
            dict(
                says="Nothing is lost: Locret finds as many as the full cache.",
                paper=f"{PAPER}: R.PassKey 100% at 128K (RTX 4090)",
                stage=both,
                measure="score",
                low=dict(cache="full"),
                high=dict(cache=locret),
                margin=0.05,
            ),
        ]
    if perplexity:
        config.stages += [
            dict(
                eval="perplexity",
                title="Loss",
                source="austen:novel=persuasion",
                length=length,
                documents=3,
                splits=[budget],
                readings=[dict(cache=cache) for cache in caches],
            )
        ]
    return config
