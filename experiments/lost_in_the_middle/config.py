"""Lost in the Middle (arXiv 2307.03172): the same answer at five places of a context.

    lclm run --config=experiments/lost_in_the_middle/config.py

Took 20 minutes of 2 CPU cores beside other runs.
Expected: the paper's curves are a U: with 20 documents MPT-30B-Instruct answers 53.7,
51.8, 52.2, 52.7 and 56.2 of 100 at places 0, 4, 9, 14 and 19 (closed book 31.7, oracle
81.7).
"""

import ml_collections


def get_config(model="smollm2-135m", keys=12, documents=4, objects=24, questions=12):
    """`keys`: pairs of each object; `documents`: of each of the `questions`."""
    config = ml_collections.ConfigDict()
    config.name = "lost_in_the_middle"
    config.title = "Lost in the middle"
    config.about = (
        "One small model is asked for a value of a JSON object, and for what one of "
        "several documents says, with the answer at every place of the context. Each "
        "question is a seed."
    )
    config.size = "smoke"
    config.model, config.quantize = model, "int8"

    def stage(kind, title, total, steps, limit, chat):
        places = [round(i * (total - 1) / steps) for i in range(steps + 1)]
        return dict(eval="lost_in_the_middle", kind=kind, title=title, total=total,
                    places=places, limit=limit, chat=chat)  # fmt: skip

    config.stages = [
        stage("kv", "Keys and values", keys, 4, objects, False),
        stage("qa", "Documents", documents, 2, questions, True),
    ]

    def claim(says, paper, title, low, high):
        return dict(says=says, paper="arXiv 2307.03172, " + paper, measure="score",
                    stage=title, seed="example", low=low, high=high)  # fmt: skip

    def at(place, strategy="whole"):
        return dict(place=place, strategy=strategy)

    qa = "MPT-30B-Instruct, 20 documents: "
    config.claims = []
    for title, total, paper in (
        ("Keys and values", keys, ("U-shaped curves of keys and values",) * 2),
        ("Documents", documents, (qa + "53.7 against 52.2", qa + "56.2 against 52.2")),
    ):
        ends = (("beginning", 0, paper[0]), ("end", total - 1, paper[1]))
        config.claims += [
            claim(f"{title}: an answer at the {word} is found more often than one in "
                  "the middle.", told, title, at(round((total - 1) / 2)), at(place))
            for word, place, told in ends
        ]  # fmt: skip
    config.claims += [
        claim(
            "Documents: closed book is below the oracle, so the answer is read.",
            qa + "31.7 against 81.7",
            "Documents",
            dict(strategy="closed_book"),
            dict(strategy="oracle"),
        ),
    ]
    return config
