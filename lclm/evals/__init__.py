"""Does it work? Evaluations that run on any object with `nll` and `generate`."""

import sys
import types

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
        "longbench": Entry(
            "lclm.evals.longbench:LongBench",
            "LongBench and -E from the benchmark's folder, 21 datasets",
        ),
        "longbench_v2": Entry(
            "lclm.evals.longbench_v2:LongBenchV2",
            "LongBench v2, four choices about long texts, from its data.json",
        ),
        "ruler": Entry(
            "lclm.evals.ruler:Ruler",
            "RULER's 13 tasks over lengths, with the effective length",
        ),
        "lost_in_the_middle": Entry(
            "lclm.evals.lost_in_the_middle:LostInTheMiddle",
            "an answer at every place among documents or keys, with bounds",
        ),
        "many_shot": Entry(
            "lclm.evals.many_shot:ManyShot",
            "labels from hundreds of shots, told as numbers, by shots (HELMET)",
        ),
        "multi_turn": Entry(
            "lclm.evals.multi_turn:MultiTurn",
            "several questions about one context, turns kept or apart (SCBench)",
        ),
    },
)

__all__ = ["EVALS"]


class _Listing(types.ModuleType):
    """Lets `lclm.evals()` list the table beside `import lclm.evals.passkey`."""

    def __call__(self) -> dict[str, str]:
        return EVALS.about()


sys.modules[__name__].__class__ = _Listing
