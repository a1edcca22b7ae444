"""InfiniPot's two signals: the share of novelty (NuC) and what the catalyst asks (CaP).

    lclm run --config=experiments/infinipot/config.py

Passkeys in contexts of `length` tokens read through a pot of `budget` that keeps half
at each distillation, before the question is known; a seed is a draw of four keys and of
their depths, one in each quarter. alpha=0 keeps by the catalyst alone, alpha=1 by
novelty alone. One row gives the question as the catalyst (CaP-Q): that row is query-
aware, all others are not. The loss on three pieces of Persuasion beside it (a seed is a
piece).
Took 24 minutes of 2 CPU cores beside other runs; README.md has what
came out.
"""

import ml_collections

PAPER = "arXiv 2410.01518"
SWEEP = f"{PAPER}, LongBench by alpha 0 to 1: 39.9, 40.7, 41.5, 41.1, 35.4 (Llama-3-8B)"


def get_config(length=1024, budget=512, trials=3):
    """`budget`: tokens of the pot."""
    pots = {a: f"infinipot:budget={budget},alpha={a}" for a in (0, 0.25, 0.5, 0.75, 1)}
    asked = f'{pots[0]},catalyst="What is the pass key? The pass key is"'
    streaming = f"streaming:sinks=4,window={budget - 4}"
    h2o = f"h2o:budget={budget}"
    caches = [pots[0.5], pots[0], pots[1], streaming, h2o, asked, pots[0.25]]
    caches += [pots[0.75], "full"]
    config = ml_collections.ConfigDict()
    config.name = f"infinipot-{length}"
    config.title = "InfiniPot on SmolLM2-135M"
    config.model = "smollm2-135m"
    config.quantize = "int8"
    config.stages = [
        dict(
            eval="passkey",
            title="Passkeys",
            lengths=[length],
            bins=4,
            trials=trials,
            caches=caches,
            questions="hidden",
        ),
        dict(
            eval="perplexity",
            title="Loss",
            source="austen:novel=persuasion",
            length=length,
            documents=3,
            splits=[budget],
            bucket=128,
            readings=[dict(cache=c) for c in (pots[0], pots[0.5], pots[1], streaming)],
        ),
    ]
    found = dict(stage="Passkeys", measure="score")
    config.claims = [
        dict(
            says="Half by novelty is better than by the catalyst alone.",
            paper=SWEEP,
            low=dict(cache=pots[0]),
            high=dict(cache=pots[0.5]),
            **found,
        ),
        dict(
            says="Half by novelty is better than by novelty alone.",
            paper=SWEEP,
            low=dict(cache=pots[1]),
            high=dict(cache=pots[0.5]),
            **found,
        ),
        dict(
            says="InfiniPot keeps more than a window with sinks of the pot's size.",
            paper=f"{PAPER}: 41.5 against 29.9 for StreamingLLM (LongBench)",
            low=dict(cache=streaming),
            high=dict(cache=pots[0.5]),
            **found,
        ),
        dict(
            says="InfiniPot keeps more than H2O of the pot's size.",
            paper=f"{PAPER}: 41.5 against 31.0 for H2O (LongBench)",
            low=dict(cache=h2o),
            high=dict(cache=pots[0.5]),
            **found,
        ),
        dict(
            says="Query-aware: the question as the catalyst beats the general prompt.",
            paper=f"{PAPER}: question answering 35.7 against 30.5",
            low=dict(cache=pots[0]),
            high=dict(cache=asked),
            **found,
        ),
        dict(
            says="Novelty alone predicts text worse than the two together.",
            paper=SWEEP,
            stage="Loss",
            measure="nll",
            low=dict(cache=pots[0.5]),
            high=dict(cache=pots[1]),
            span=[budget, length],
        ),
    ]
    return config
