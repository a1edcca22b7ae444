"""StreamingLLM (arXiv 2309.17453): four first tokens keep a sliding window alive.

    lclm run --config=experiments/streaming/config.py

Took 19 and 11 minutes in two sittings of 2 CPU cores beside other runs.
Expected: the paper's table 1 (Llama-2-13B, 65k tokens of PG19): dense attention 5,641,
a window 5,158, re-computation 5.43, 4 sinks 5.40, 4 newlines as sinks 5.60; table 2
(Llama-2-7B): 3,359.95, 11.88, 10.51, 9.59 and 9.54 with 0, 1, 2, 4 and 8 sinks; figure
10: re-computation takes up to 22 times as long a token, more the larger the window.
"""

import ml_collections

NOVELS = ("emma", "persuasion", "pride and prejudice")
SINKS = (0, 1, 2, 4, 8)
PAPER = "arXiv 2309.17453, "


def get_config(model="smollm2-135m", keep=512, length=12288, short=2048, timed=16):
    """`keep`: tokens of every bounded cache, sinks included. `length`: tokens read past
    the trained length; every cache reads `short`. `timed`: tokens after a full window
    whose time is taken.
    """
    config = ml_collections.ConfigDict()
    config.name = "streaming"
    config.title = "Attention sinks"
    config.about = (
        "One small pretrained model reads three novels with caches of one size: what a "
        "window loses when its first tokens leave, how many of them it needs, whether "
        "their place or their meaning matters, and what re-computation costs instead."
    )
    config.size = "smoke"
    config.model, config.quantize = model, "int8"
    stream = f"streaming:sinks=4,window={keep - 4}"
    caches = [
        dict(cache=f"window:window={keep}", label="window"),
        *(
            dict(
                cache=f"streaming:sinks={n},window={keep - n}",
                label=f"{n} sink{'s' * (n != 1)}",
            )
            for n in SINKS
        ),
        dict(cache=stream, label="4 newlines", opening=["\n"] * 4),
        dict(
            cache=f"recompute:window={keep},stride={keep // 4}", label="re-computation"
        ),
    ]
    trained = [dict(cache="full", label="dense"), dict(cache=stream, label="4 sinks")]

    def reading(novel, title, length, readings):
        return dict(
            eval="perplexity",
            title=title,
            source=f"austen:novel={novel}",
            length=length,
            splits=[n for n in (keep, 8192, 10240) if n < length],
            readings=readings,
        )

    titles = {novel: novel.capitalize() for novel in NOVELS}
    texts = [reading(novel, title, short, caches) for novel, title in titles.items()]
    past = [
        reading(novel, f"{title}, past 8k", length, trained)
        for novel, title in titles.items()
    ]
    sizes = (keep // 4, keep // 2, keep)
    times = [
        dict(
            eval="perplexity",
            title=f"Time of a token at {size}",
            source="austen:novel=emma",
            length=size + timed,
            documents=3,
            readings=[
                dict(cache=f"recompute:window={size}", label=f"re-computation {size}"),
                dict(cache=f"streaming:sinks=4,window={size - 4}", chunk=1,
                     label=f"4 sinks {size}"),
            ],
        )
        for size in sizes
    ]  # fmt: skip
    config.stages = [*texts, *times, *past]
    novels = list(titles.values())

    def claim(says, paper, low, high, **more):
        sides = dict(low=dict(label=low), high=dict(label=high))
        told = dict(measure="nll", stage=novels, seed="stage", span=[keep, short])
        return {**told, **sides, "says": says, "paper": PAPER + paper, **more}

    config.claims = [
        claim("A window alone fails once the first tokens have left it; with four of "
              "them kept it does not.", "table 1: 5.40 against 5,158 (perplexity)",
              "4 sinks", "window"),
        claim("With four sinks the window reads as well as one that is computed anew "
              "(within 0.05 nats).", "table 1: 5.40 against 5.43",
              "4 sinks", "re-computation", margin=0.05),
        claim("Dense attention fails past its trained length; four sinks and a window "
              "do not.", "table 1: 5.40 against 5,641", "4 sinks", "dense",
              stage=[f"{title}, past 8k" for title in novels], span=[10240, length]),
        claim("The sinks' place matters, not their meaning: four newlines in place of "
              "the first tokens do as well (within 0.1 nats).",
              "table 1: 5.60 against 5.40", "4 newlines", "4 sinks", margin=0.1),
        claim("One sink is much better than none.",
              "table 2: 11.88 against 3,359.95 (Llama-2-7B)", "1 sink", "0 sinks"),
        claim("Four sinks are better than one.", "table 2: 9.59 against 11.88",
              "4 sinks", "1 sink"),
        claim("More than four sinks add little: four are within 0.02 nats of eight.",
              "table 2: 9.59 against 9.54", "4 sinks", "8 sinks", margin=0.02),
        *(
            claim(f"At a window of {size}, re-computation makes fewer tokens a second.",
                  "figure 10: up to 22.2 times the time a token",
                  f"re-computation {size}", f"4 sinks {size}", seed="seed",
                  measure="tokens_per_second", stage=f"Time of a token at {size}",
                  span=[])
            for size in sizes
        ),
    ]  # fmt: skip
    return config
