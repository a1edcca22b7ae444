"""What trained gates are worth: DuoAttention beside other caches of equal bytes.

    lclm run --config=experiments/duo_gates/config.py
    lclm run --config=experiments/duo_gates/config.py:length=2048,size=64MB

Passkeys in the first half of contexts of `length` tokens, read and compressed before
the question is known; a seed is a draw of five keys, one at each depth. Every bounded
cache takes `size`, all that it allocates counted: at the default duo's 45 streaming
heads hold 16 first tokens and about the last 128, as they were trained, and
StreamingLLM and H2O hold about 700 of 1,024 tokens in all heads. The second half of the
context is left out: what any window of half the context still holds says nothing.
"""

import ml_collections

PAPER = "arXiv 2410.10819"


def get_config(length=1024, size="33MB", trials=3, gates=""):
    """`gates`: a file of gates instead of those that come with lclm."""
    own = f",gates={gates}" if gates else ""
    base = f"duo:sinks=16,sparsity=0.5,window={size}"
    duo, streaming = f"{base}{own}", f"streaming:sinks=16,window={size}"
    random = [f"{base},gates=random:{seed}" for seed in range(3)]
    h2o = f"h2o:budget={size}"
    config = ml_collections.ConfigDict()
    config.name = f"duo-{length}"
    config.title = "DuoAttention on SmolLM2-135M"
    config.model = "smollm2-135m"
    config.quantize = "int8"
    config.stages = [
        dict(
            eval="passkey",
            title="Passkeys",
            lengths=[length],
            depths=[0.05, 0.15, 0.25, 0.35, 0.45],
            trials=trials,
            caches=[duo, streaming, h2o, *random, "full"],
            questions="hidden",
        )
    ]
    found = dict(stage="Passkeys", measure="score", high=dict(cache=duo))
    config.claims = [
        dict(
            says="Trained gates choose better heads than chance.",
            paper="a control of ours: three random choices of half the heads",
            low=dict(cache=random),
            **found,
        ),
        dict(
            says="At equal bytes DuoAttention finds what StreamingLLM has dropped.",
            paper=f"{PAPER}: LongBench 40.2 against 32.3 (Llama-3-8B, half the heads)",
            low=dict(cache=streaming),
            **found,
        ),
        dict(
            says="At equal bytes DuoAttention finds more than H2O.",
            paper=f"{PAPER}: LongBench 40.2 against 35.8 (Llama-3-8B, half the heads)",
            low=dict(cache=h2o),
            **found,
        ),
        dict(
            says="Half the heads are enough: as many are found as with all.",
            paper=f"{PAPER}: LongBench 40.2 against 40.1 in full (Llama-3-8B)",
            stage="Passkeys",
            measure="score",
            low=dict(cache="full"),
            high=dict(cache=duo),
            margin=0.05,
        ),
    ]
    return config
