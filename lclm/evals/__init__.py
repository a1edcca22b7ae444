"""Does it work? Evaluations that run on any object with `nll` and `generate`."""

from lclm.registry import Entry, Table

EVALS = Table(
    "eval",
    {
        "perplexity": Entry(
            "lclm.evals.perplexity:Perplexity",
            "loss on one text by cache policy, by position, in bits per byte",
        ),
        "passkey": Entry(
            "lclm.evals.passkey:Passkey",
            "five digits hidden in filler, by length and depth",
        ),
        "needle": Entry(
            "lclm.evals.needle:Needle",
            "facts hidden in a real text, by length and depth, with a heatmap",
        ),
    },
)

__all__ = ["EVALS"]
