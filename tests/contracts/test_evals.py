"""The contract of every evaluation: same seed, same questions; right is 1, nothing 0.

A new evaluation joins by a line in `EVALS` and its small settings in `SMALL`.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "evals"))

import eval_files
from eval_doubles import Bpe, Said, Scripted

from lclm.data import qa
from lclm.evals import EVALS
from lclm.evals.base import Evaluation, Journal, key_of

SMALL = {
    "passkey": dict(lengths=(300, 400), depths=(0.0, 1.0), questions="hidden"),
    "needle": dict(lengths=(500,), points=3, needles=2, source="SOURCE"),
    "longbench": dict(folder="LONGBENCH"),
    "longbench:extended": dict(folder="LONGBENCH", extended=True),
    "longbench_v2": dict(file="V2"),
    "lost_in_the_middle:kv": dict(
        kind="kv", total=5, limit=2, strategies=("whole", "oracle")
    ),
    "lost_in_the_middle:qa": dict(
        total=14, distractors="easy", limit=2, strategies=("whole",), places=(0, 5)
    ),
    "ruler": dict(lengths=(1500,), samples=1, source="SOURCE"),
    "many_shot": dict(data="LABELLED", shots=(4, 9), limit=3, asked=2),
    "multi_turn": dict(data="LABELLED", lengths=(1800,), turns=2, samples=1),
    "multi_turn:own": dict(
        tasks=("kv", "vt"),
        lengths=(1500,),
        turns=3,
        samples=1,
        modes=("multi_turn_own",),
        questions="seen",
    ),
    "multi_turn:files": dict(folder="SCBENCH"),
}
WITHOUT_QUESTIONS = {"perplexity"}


@pytest.fixture(scope="module")
def tokenizer():
    return Bpe()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    text = folder / "prose.txt"
    text.write_text(eval_files.prose(), encoding="utf-8")
    return {
        "SOURCE": f"local:path={text}",
        "LONGBENCH": str(eval_files.longbench(folder / "longbench")),
        "LABELLED": f"jsonl:path={eval_files.labelled(folder / 'labelled.jsonl')}",
        "SCBENCH": str(eval_files.scbench(folder / "scbench")),
        "V2": str(eval_files.longbench_v2(folder / "data.json")),
    }


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    monkeypatch.setattr(qa, "_member", eval_files.questions)


def build(case, places):
    told = {k: places.get(v, v) if isinstance(v, str) else v
            for k, v in SMALL[case].items()}  # fmt: skip
    return EVALS[case.partition(":")[0]](**told)


class Knowing(Scripted):
    """Answers what it was asked before, and nothing else."""

    def __init__(self, tokenizer, examples, *, right=True):
        super().__init__(tokenizer)
        self.known = {}
        for example in examples:
            for query in example.queries:
                for text in (example.context, query.gold):
                    prompt = example.opening + text + query.text
                    self.known[prompt] = query.perfect if right else ""
        self.examples = examples

    def generate(self, prompt, *, max_new_tokens, cache="full", room=0):
        self.calls.append(("generate", cache, len(prompt)))
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        text = self.tokenizer.decode(ids)
        if text not in self.known:  # Turns stand between a context and its question.
            (text,) = (
                example.opening + example.context + query.text
                for example in self.examples
                for query in example.queries
                if text.startswith(example.opening + example.context)
                and text.endswith(query.text)
            )
        return Said(self.known[text])


def test_every_evaluation_is_held_to_the_contract():
    assert {case.partition(":")[0] for case in SMALL} | WITHOUT_QUESTIONS == set(EVALS)


@pytest.mark.parametrize("case", SMALL)
def test_the_same_seed_gives_the_same_examples_and_another_does_not(
    case, places, tokenizer
):
    job = build(case, places)
    assert isinstance(job, Evaluation)
    examples = job.examples(tokenizer)
    assert examples == build(case, places).examples(tokenizer)
    assert all(e.queries for e in examples)
    if hasattr(job, "seed") and not getattr(job, "folder", ""):
        other = dataclasses.replace(job, seed=job.seed + 1).examples(tokenizer)
        assert other != examples


@pytest.mark.parametrize("case", SMALL)
def test_a_perfect_answer_scores_one_and_an_empty_one_zero(case, places, tokenizer):
    job = build(case, places)
    for example in job.examples(tokenizer):
        for query in example.queries:
            assert job.grade(query, query.perfect) == pytest.approx(1, abs=1e-7)
            assert job.grade(query, "") == 0
            assert job.grade(query, "zz 0") < 0.5


@pytest.mark.parametrize("case", [c for c in SMALL if "lengths" in SMALL[c]])
def test_a_prompt_is_as_long_as_asked_and_never_longer(case, places, tokenizer):
    job = build(case, places)
    for example in job.examples(tokenizer):
        asked = "".join(query.text for query in example.queries)
        total = len(tokenizer.encode(example.opening + example.context + asked))
        if case not in ("passkey", "needle"):
            total += sum(query.max_new_tokens for query in example.queries)
        assert total <= max(job.lengths)
        kind = example.meta.get("ruler") or example.meta.get("kind", "")
        if not kind.startswith("qa"):
            assert total > min(job.lengths) - 150


@pytest.mark.parametrize("case", SMALL)
def test_records_are_whole_and_a_second_run_asks_nothing(
    case, places, tokenizer, tmp_path
):
    job = build(case, places)
    path = tmp_path / "m.jsonl"
    knowing = Knowing(tokenizer, job.examples(tokenizer))
    records = job.run(knowing, journal=Journal(path), observe=lambda *_: None)
    assert [r["score"] for r in records] == [pytest.approx(1)] * len(records)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({key_of(r) for r in records}) == len(records) == len(lines)
    for record in records:
        assert record["answers"] and record["prompt_tokens"] > 0
    again = Knowing(tokenizer, [])
    assert job.run(again, journal=Journal(path), observe=lambda *_: None) == records
    assert again.calls == []
    summary = job.summary(records, trained=8192)
    assert all(len(row) == len(p.columns) for p in summary.panels for row in p.rows)
    assert summary.csv and all("," in text for text in summary.csv.values())


@pytest.mark.parametrize("case", SMALL)
def test_a_model_that_says_nothing_scores_nothing(case, places, tokenizer, tmp_path):
    job = build(case, places)
    silent = Knowing(tokenizer, job.examples(tokenizer), right=False)
    journal = Journal(tmp_path / "m.jsonl")
    records = job.run(silent, journal=journal, observe=lambda *_: None)
    assert {r["score"] for r in records} == {0}
