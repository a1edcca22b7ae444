"""Small files in the benchmarks' own formats, made here, and a text with many words."""

import gzip
import json
import random

from lclm.evals.longbench_tasks import DATASETS

WANTED = {
    "retrieval": "Paragraph 3",
    "retrieval_zh": "段落3",
    "count": "7",
    "classification": "Person",
}
MARKS = ("amber", "bronze", "cobalt", "dusty", "ebony", "fawn", "green", "hazel")


def prose(words=600, seed=0):
    """Sentences of pronounceable words, some hundreds of them distinct."""
    rng = random.Random(seed)
    made = ["".join(rng.choice("bdfklmnrst") + rng.choice("aeiou") for _ in range(n))
            for n in (2, 3) for _ in range(words)]  # fmt: skip
    lines = (" ".join(rng.sample(made, 9)).capitalize() + "." for _ in range(200))
    return " ".join(lines)


def longbench(folder, lines=3):
    """A folder as LongBench's: 21 files and 13 of -E, two lines about one text."""
    (folder / "data").mkdir(parents=True)
    for name, dataset in DATASETS.items():
        for end in (".jsonl", "_e.jsonl")[: 1 + dataset.extended]:
            rows = [longbench_line(name, i) for i in range(lines)]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "data" / f"{name}{end}").write_text(text, encoding="utf-8")
    return folder


def longbench_line(name, i):
    metric = DATASETS[name].metric
    # Lines 0 and 1 share a text, unless only the text tells their prompts apart.
    apart = f" ({i})" if "{input}" not in DATASETS[name].prompt else ""
    return {
        "input": f"What of {MARKS[i]} in {name}?",
        "context": "Some text. " * (20 if i < 2 else 40) + apart,
        "answers": ["no such thing", WANTED.get(metric, f"return {MARKS[i]} 北京")][
            metric in WANTED or i % 2 :
        ],
        "length": 100 if i < 2 else 5000,
        "dataset": name,
        "language": DATASETS[name].language,
        "all_classes": ["no such thing", "Person"]
        if metric == "classification"
        else None,
        "_id": f"{name}{i}",
    }


def longbench_v2(path, lines=4):
    """Questions with four choices, as LongBench v2 has them."""
    rows = [
        {
            "_id": f"{i}",
            "domain": "Single-Document QA",
            "sub_domain": "Legal",
            "difficulty": ("easy", "hard")[i % 2],
            "length": ("short", "medium", "long")[i % 3],
            "question": f"Which mark is {MARKS[i]}?",
            **{f"choice_{c}": f"mark {c}" for c in "ABCD"},
            "answer": "ABCD"[i % 4],
            "context": f"The {MARKS[i]} text. " * 20,
        }
        for i in range(lines)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def labelled(path, lines=80):
    """Texts of four labels that name their own, a tenth of them to ask about."""
    rows = [
        {"text": f"number {i} of the {MARKS[i % 4]} kind", "label": MARKS[i % 4]}
        for i in range(lines)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def function(mark):
    """Code that is unlike that of another mark."""
    body = f"{mark}_sum = {mark}_in + {mark}_in\n    return {mark}_sum"
    return f"def double_{mark}({mark}_in):\n    {body}"


def scbench(folder):
    """Files of SCBench's kinds, two lines of two turns each."""
    folder.mkdir()
    turns = {
        "kv": lambda m: (f"{m} key?", f"{m}-value"),
        "prefix_suffix": lambda m: (f"Which begins with {m}?", f"{m}zz-tail"),
        "vt": lambda m: (f"Variables of {m}?", [f"{m.upper()}A", f"{m.upper()}B"]),
        "many_shot": lambda m: (f"{m} is", f"({m})"),
        "mf": lambda m: (f"The {m} number is", 3 + len(m)),
        "qa_eng": lambda m: (f"Who saw {m}?", ["no such one", f"the {m} man"]),
        "qa_chn": lambda m: (f"{m}在哪里?", ["北京"]),
        "choice_eng": lambda m: (f"What is {m}?", "B"),
        "summary": lambda m: (f"Tell the story of {m}.", f"Once {m} ran\nand rested"),
        "summary_with_needles": lambda m: (f"The pass key of {m}?", "68129"),
        "repoqa": lambda m: (f"It doubles {m}.", function(m)),
        "repoqa_and_kv": lambda m: (f"It doubles {m}.", function(m)),
    }
    mixed = {
        "summary_with_needles": ("scbench_passkey", "scbench_summary"),
        "repoqa_and_kv": ("scbench_repoqa", "scbench_kv"),
    }
    for name, turn in turns.items():
        rows = []
        for i in range(2):
            asked = [turn(mark) for mark in MARKS[2 * i : 2 * i + 2]]
            more = {"options": ["w", "x", "y", "z"]} if name == "choice_eng" else {}
            talk = [{"input": q, "answer": a, **more} for q, a in asked]
            for place, said in enumerate(talk):
                if name in mixed:
                    said["task"] = mixed[name][place]
                if name.startswith("repoqa") and said.get("task") != "scbench_kv":
                    said["name"] = f"double_{MARKS[2 * i + place]}"
            text = [5, 9, i] if name == "mf" else f"Text {i} of {name}. " * 9
            row = {"id": i, "context": text, "multi_turns": talk}
            rows.append(row | ({"repo": "mill"} if name.startswith("repoqa") else {}))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"scbench_{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def nq_open(path, lines=6, documents=1):
    """A qa file of Lost in the Middle; `documents` = 1 is the oracle file."""
    rows = [
        {
            "question": f"who painted the {mark} door",
            "answers": [f"The {mark.title()} Painter"],
            "ctxs": [
                {
                    "title": f"Doors {i}",
                    "text": f"The {mark} door was painted by the {mark} painter."
                    # It may not stand beside the first question.
                    + " Not by the amber painter." * (i == 1),
                    "isgold": True,
                    "hasanswer": True,
                }
            ]
            + [
                {"title": "Windows", "text": f"Window {k} is {mark}.", "isgold": False}
                for k in range(documents - 1)
            ],
        }
        for i, mark in enumerate(MARKS[:lines])
    ]
    return _packed(path, rows)


def kv_retrieval(path, keys=6, lines=3):
    """A kv file of Lost in the Middle."""
    rows = []
    for i in range(lines):
        pairs = [[f"key-{i}-{k}", f"value-{i}-{k}"] for k in range(keys)]
        at = (2 * i + 1) % keys
        told = {"key": pairs[at][0], "value": pairs[at][1]}
        rows.append({"ordered_kv_records": pairs, **told})
    return _packed(path, rows)


def _packed(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def questions(name):
    """HotpotQA's and SQuAD's JSON, by the end of the member's name."""
    if name.endswith("hotpotqa.json"):
        return [
            {
                "_id": f"h{i}",
                "question": f"Who wrote about the {mark} river?",
                "answer": f"{mark} writer",
                "supporting_facts": [[f"{mark} river", 0], [f"{mark} book", 0]],
                "context": [
                    [f"{mark} river", [f"The {mark} river is long.", " It is wide."]],
                    [f"{mark} book", [f"It is by the {mark} writer."]],
                    *[[f"Hill {i} {k}", [f"Hill {k} of {mark}.", " It is high."]]
                      for k in range(8)],
                ],
            }
            for i, mark in enumerate(MARKS)
        ]  # fmt: skip
    paragraphs = [
        {
            "context": f"The {mark} house has {i + 3} rooms. It is old.",
            "qas": [
                {
                    "id": f"s{i}",
                    "question": f"How many rooms has the {mark} house?",
                    "answers": [{"text": f"{i + 3} rooms"}] * 2,
                    "is_impossible": False,
                },
                {"id": "x", "question": "?", "answers": [], "is_impossible": True},
            ],
        }
        for i, mark in enumerate(MARKS)
    ]
    halves = [("Houses", paragraphs[:4]), ("Homes", paragraphs[4:])]
    return {"data": [{"title": t, "paragraphs": p} for t, p in halves]}
