"""What trained gates are worth: DuoAttention beside other caches of equal bytes.

    lclm run --config=experiments/duo_gates/config.py
    lclm run --config=experiments/duo_gates/config.py:length=2048,size=64MB

Passkeys and needles in contexts of `length` tokens, read and compressed before the
question is known. A seed is a draw of five keys and of their depths, one in each fifth
of the context; of needles a draw of five facts. Every bounded cache takes `size`, all
that it allocates counted: at the default duo's 45 streaming heads hold 16 first tokens
and about the last 128, as they were trained, and StreamingLLM and H2O hold about 700 of
1,024 tokens in all heads. About 30 minutes of 2 cores; with trials=3 half of that, and
StreamingLLM is undecided.
"""

import ml_collections

PAPER = "arXiv 2410.10819"


def get_config(length=1024, size="33MB", trials=6, gates=""):
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
    asked = dict(
        lengths=[length],
        trials=trials,
        caches=[duo, streaming, h2o, *random, "full"],
        questions="hidden",
    )
    config.stages = [
        dict(eval="passkey", title="Passkeys", bins=5, **asked),
        dict(eval="needle", title="Needles", at=[0.1, 0.3, 0.5, 0.7, 0.9], **asked),
    ]
    both = ["Passkeys", "Needles"]
    found = dict(stage=both, measure="score", high=dict(cache=duo))
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
            stage=both,
            measure="score",
            low=dict(cache="full"),
            high=dict(cache=duo),
            margin=0.05,
        ),
    ]
    return config
