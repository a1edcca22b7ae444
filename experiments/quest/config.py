"""Quest beside caches that evict: at as many tokens read, and at as many bytes held.

    lclm run --config=experiments/quest/config.py

Quest keeps every token and reads few of them, so a budget means two things. At an equal
number of tokens a query reads, an evicting cache holds a fraction of Quest's bytes; at
Quest's bytes (`held`) it holds all tokens of a context this short and is exact. Both
are asked, each under its own claim.

Passkeys in contexts of `length` tokens, read before the question is known (a seed is a
draw of four keys and of their depths, one in each quarter), and the loss on three
pieces of Persuasion (a seed is a piece). Evicting caches are bounded throughout
(at=chunk, 512 tokens a call).
README.md has what came out; not timed alone.
"""

import ml_collections

PAPER = "arXiv 2406.10774"
PASSKEYS = f"{PAPER}: passkeys in 10K, 99% at 64 to 256 tokens, H2O and TOVA at most 8%"


def get_config(length=1024, budgets="64+128", trials=6, held="70MB"):
    """`budgets`: tokens that a query reads, joined by +; the last decides claims."""
    sizes = [int(size) for size in budgets.split("+")]
    quest = [f"quest:budget={size}" for size in sizes]
    evict = {
        "H2O": [f"h2o:budget={size}" for size in sizes],
        "SnapKV": [f"snapkv:budget={size}" for size in sizes],
        "StreamingLLM": [f"streaming:sinks=4,window={size - 4}" for size in sizes],
    }
    alike = f"h2o:budget={held}"
    last = [quest[-1], *(caches[-1] for caches in evict.values())]
    first = [quest[0], evict["H2O"][0]]
    config = ml_collections.ConfigDict()
    config.name = f"quest-{length}"
    config.title = "Quest on SmolLM2-135M"
    config.model = "smollm2-135m"
    config.quantize = "int8"
    config.stages = [
        dict(
            eval="passkey",
            title="Passkeys",
            lengths=[length],
            bins=4,
            trials=trials,
            caches=[*last, *(c for c in first if c not in last), alike, "full"],
            questions="hidden",
        ),
        dict(
            eval="perplexity",
            title="Loss",
            source="austen:novel=persuasion",
            length=length,
            documents=3,
            splits=[sizes[-1]],
            bucket=128,
            readings=[dict(cache=cache) for cache in [*last, "full"]],
        ),
    ]
    config.claims = [
        dict(
            says=f"Reading {sizes[-1]} tokens, Quest finds what {name} has dropped.",
            paper=PASSKEYS,
            stage="Passkeys",
            measure="score",
            low=dict(cache=caches[-1]),
            high=dict(cache=quest[-1]),
        )
        for name, caches in evict.items()
    ]
    config.claims += [
        dict(
            says="At Quest's bytes an evicting cache is still worse.",
            paper="not compared there; 9/8 of the full cache is Quest's own size",
            stage="Passkeys",
            measure="score",
            low=dict(cache=alike),
            high=dict(cache=quest[-1]),
        ),
        dict(
            says="Quest finds as many as the full cache.",
            paper=PASSKEYS,
            stage="Passkeys",
            measure="score",
            low=dict(cache="full"),
            high=dict(cache=quest[-1]),
            margin=0.05,
        ),
        *(
            dict(
                says=f"Reading {sizes[-1]} tokens, Quest predicts text better than "
                f"{name}.",
                paper=f"{PAPER}: PG19 perplexity near the full cache's at 4,096 tokens",
                stage="Loss",
                measure="nll",
                low=dict(cache=quest[-1]),
                high=dict(cache=caches[-1]),
                span=[sizes[-1], length],
            )
            for name, caches in evict.items()
        ),
    ]
    return config
