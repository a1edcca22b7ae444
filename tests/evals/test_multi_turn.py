"""Laws of shared contexts: turns stay or not, in one session, and resume the same."""

import json
import re

import eval_files
import pytest
from eval_doubles import Letters, Said, Scripted

from lclm.data import qa
from lclm.errors import LclmError
from lclm.evals import scbench
from lclm.evals.asking import Prompt, converse
from lclm.evals.base import Example, Journal, Query, silent
from lclm.evals.exam import Exam, Item, chat_between
from lclm.evals.labelled import read
from lclm.evals.multi_turn import MultiTurn
from lclm.evals.multi_turn_tasks import TASKS, Sample, make
from lclm.language_model import LanguageModel
from tests.tiny import tiny_lm

QUERIES = tuple(
    Query(f"\n\nWhat of {mark}? It is:", (f"gold {mark}",), 12, start=" It is:")
    for mark in ("one", "two", "three")
)
EXAMPLE = Example("A long text.", QUERIES, "Read.\n")


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    monkeypatch.setattr(qa, "_member", eval_files.questions)


class Echo(Scripted):
    """Notes every prompt and says how many it has heard."""

    def __init__(self):
        super().__init__(Letters())
        self.heard = []

    def generate(self, prompt, *, max_new_tokens, cache="full", room=0):
        self.heard.append(self.tokenizer.decode(prompt))
        return Said(f" said {len(self.heard)}")


def put(lm, journal, *, mode="multi_turn", questions="hidden", **settings):
    exam = Exam(questions=questions, modes=(mode,), **settings)
    items = [Item({"example": "x"}, lambda: EXAMPLE, len(QUERIES))]
    how = dict(lm=lm, task="t", grade=lambda q, a: float(a == q.answers[0]))
    return exam.run(items, journal=journal, observe=silent, **how)


@pytest.mark.parametrize("questions", ["hidden", "seen"])
def test_turns_stay_with_the_wanted_answers_or_the_model_s_own(tmp_path, questions):
    start = EXAMPLE.opening + EXAMPLE.context
    one, two, three = (q.text for q in QUERIES)
    journal = Journal(tmp_path / "m.jsonl")
    for mode, left in (("multi_turn", "gold {0}"), ("multi_turn_own", "said {1}")):
        lm = Echo()
        records = put(lm, journal, mode=mode, questions=questions)
        a, b = (f" {left}".format(m, i) for m, i in (("one", 1), ("two", 2)))
        texts = [start + one, start + one + a + two]
        texts.append(texts[1] + b + three)
        assert lm.heard == texts
        assert [r["prompt_tokens"] for r in records] == [len(t) for t in texts]
        read = [c for c in lm.calls if c[0] == "prefill"]
        first = start + one if questions == "seen" else start
        assert [c[2] for c in read] == [len(first)]
    lm = Echo()
    put(lm, journal, mode="multi_request", questions=questions)
    assert lm.heard == [start + q.text for q in QUERIES]
    assert len([c for c in lm.calls if c[0] == "prefill"]) == (questions == "hidden")


@pytest.mark.parametrize("mode", ["multi_turn", "multi_turn_own"])
def test_an_interrupted_session_asks_its_turns_again_and_records_what_is_missing(
    tmp_path, mode
):
    class Stopped(Echo):
        def generate(self, prompt, **how):
            if len(self.heard) == 2:
                raise KeyboardInterrupt
            return super().generate(prompt, **how)

    whole = put(Echo(), Journal(tmp_path / "whole.jsonl"), mode=mode)
    path = tmp_path / "m.jsonl"
    with pytest.raises(KeyboardInterrupt):
        put(Stopped(), Journal(path), mode=mode)
    assert len(path.read_text().splitlines()) == 2
    lm = Echo()
    found = put(lm, Journal(path), mode=mode)
    assert len(lm.heard) == 3 and len(path.read_text().splitlines()) == 3
    plain = [{k: v for k, v in r.items() if k != "seconds"} for r in found]
    assert plain == [{k: v for k, v in r.items() if k != "seconds"} for r in whole]
    again = Echo()
    assert put(again, Journal(path), mode=mode) == found and again.heard == []


def test_a_template_stands_between_an_answer_and_the_next_question(tmp_path):
    lm = Echo()
    lm.tokenizer.chat = lambda messages: (
        "".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in messages)
        + "<assistant>"
    )
    assert chat_between(lm) == "</assistant><user>"
    put(lm, Journal(tmp_path / "m.jsonl"), chat=True)
    turn = "</user><assistant> It is:"
    one, two = (q.text.removesuffix(" It is:") for q in QUERIES[:2])
    head = f"<user>{EXAMPLE.opening}{EXAMPLE.context}"
    assert lm.heard[0] == f"{head}{one}{turn}"
    assert lm.heard[1] == f"{head}{one}{turn} gold one</assistant><user>{two}{turn}"


def test_a_context_over_the_budget_skips_its_whole_session_and_may_be_cut(tmp_path):
    lm, journal = Echo(), Journal(tmp_path / "m.jsonl")
    records = put(lm, journal, budget=30)
    assert [r["score"] for r in records] == [None] * 3 and lm.heard == []
    cut = put(lm, journal, budget=30, strategies=("truncate:side=right",))
    assert all("skipped" not in r for r in cut)
    assert lm.heard[0].startswith(EXAMPLE.opening)
    assert lm.heard[0].endswith(QUERIES[0].text)
    assert len(lm.heard[0]) <= 30 < len(lm.heard[1])
    assert lm.heard[1].startswith(lm.heard[0] + " gold one")
    with pytest.raises(LclmError, match=r"\['bm25'\] choose a context for one"):
        Exam(strategies=("bm25",), budget=9, modes=("multi_turn",))
    Exam(strategies=("bm25",), budget=9, modes=("multi_request",))


@pytest.mark.parametrize(
    "cache",
    [pytest.param("full", marks=pytest.mark.slow), "streaming:sinks=2,window=14"],
)
def test_a_real_session_answers_as_its_whole_text_read_anew(cache):
    lm = LanguageModel(tiny_lm().config, tiny_lm().params, Letters97())
    asked = [Prompt("", q.text, q) for q in QUERIES]
    asked[0] = Prompt(EXAMPLE.opening + EXAMPLE.context, QUERIES[0].text, QUERIES[0])
    said = list(converse(lm, asked, cache=cache, questions="hidden", own=False))
    text = asked[0].before
    for prompt, found in zip(asked, said, strict=True):
        text += prompt.after
        ids = lm.tokenizer.encode(text)
        assert found["prompt_tokens"] == len(ids)
        alone = lm.generate(ids, max_new_tokens=12, cache=cache)
        assert found["prediction"] == alone.text
        text += f" {prompt.query.perfect}"


class Letters97:
    """A tokenizer of 97 ids for a tiny model."""

    add_bos, eos_ids = False, ()

    def encode(self, text, *, bos=False):
        return [ord(c) % 97 for c in text]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def stream(self):
        return Streamed()


class Streamed:
    def push(self, token):
        return f"{token} "

    def flush(self):
        return ""


@pytest.fixture(scope="module")
def sample():
    return lambda length, seed=0, turns=3: Sample(
        length, seed, turns, lambda: read("squad")
    )


@pytest.mark.parametrize("kind", TASKS)
def test_a_built_context_answers_each_question_once_and_one_unit_more_is_too_long(
    kind, tokenizer, sample
):
    turns = 1 if kind == "many_shot" else 3
    length = 900 if kind == "qa" else 1800
    for seed in (0, 1):
        told = sample(length, seed, turns)
        made = make(tokenizer, kind, told, starts=3)
        asked = "".join(q.text for q in made.queries)
        new = sum(q.max_new_tokens for q in made.queries)

        def size(example, asked=asked, new=new):
            text = example.opening + example.context + asked
            return 3 + len(tokenizer.encode(text)) + new

        assert size(made) == made.meta["total"] <= length
        more = TASKS[kind](told)(made.meta["units"] + 1)
        assert more is None if kind == "qa" else size(more) > length
        assert len(made.queries) == len({q.text for q in made.queries}) == turns
        for query in made.queries:
            assert query.text.endswith(query.start) and query.text.startswith("\n\n")
            assert all(a in made.context and a in query.gold for a in query.answers)
            fits = len(tokenizer.encode(" " + query.perfect))
            assert fits <= 2 * query.max_new_tokens
            if kind in ("kv", "prefix_suffix"):
                assert made.context.count(query.answers[0]) == 1
                assert query.answers[0] not in query.text


def test_pairs_strings_and_chains_are_laid_over_the_whole_context(tokenizer, sample):
    kv = make(tokenizer, "kv", sample(4000, turns=4))
    pairs = list(json.loads(kv.context))
    asked = [re.search(r'Key: "(.*)"', q.text)[1] for q in kv.queries]
    slices = sorted(4 * pairs.index(key) // len(pairs) for key in asked)
    assert slices == [0, 1, 2, 3] and len(pairs) == kv.meta["units"] + 4
    found = make(tokenizer, "prefix_suffix", sample(3000))
    words = found.context.splitlines()
    for query in found.queries:
        first, last = re.findall(r'"(\w+)"', query.text)
        assert [w for w in words if w.startswith(first) and w.endswith(last)] == [
            query.answers[0]
        ]
        assert sum(w.startswith(first) for w in words) == 2
        assert sum(w.endswith(last) for w in words) == 2
    vt = make(tokenizer, "vt", sample(3000))
    lines = [x for x in vt.context.splitlines() if x.startswith("VAR")]
    assert len(lines) == 15
    for query in vt.queries:
        (value,) = set(re.findall(r"\d{5}", query.text))
        names, left = [], [value]
        for line in lines:  # In the order of the text, each follows the one before.
            name, source = re.fullmatch(r"VAR (\w+) = (?:VAR )?(\w+)", line).groups()
            if source in left:
                names.append(name)
                left.append(name)
        assert tuple(names) == query.answers


def test_an_article_stays_in_its_order_under_its_title(tokenizer, sample):
    made = make(tokenizer, "qa", sample(900))
    article = next(a for a in qa.squad() if made.queries[0].gold in a.paragraphs)
    places = [made.context.find(p) for p in article.paragraphs if p in made.context]
    assert places == sorted(places) and made.context.count(article.title) == 1
    assert {q.gold for q in made.queries} <= set(article.paragraphs)


def test_modes_and_turns_stand_against_each_other(tmp_path):
    job = MultiTurn(tasks=("kv", "vt"), lengths=(900, 1000), turns=2)
    records = [
        dict(cache="full", strategy="whole", questions="hidden", mode=mode, kind=kind,
             length=length, query=turn, score=float(mode == "multi_request" or turn))
        for mode in job.modes for kind in job.tasks for length in job.lengths
        for turn in (0, 1)
    ]  # fmt: skip
    turn, task, length, less = job.summary(records, trained=0).panels
    assert turn.columns == ("way", "turn 1", "turn 2", "all", "skipped")
    assert turn.rows == (
        ("multi_turn", "0.0", "100.0", "50.0", "0"),
        ("multi_request", "100.0", "100.0", "100.0", "0"),
    )
    assert task.columns[1:3] == ("kv", "vt") and len(length.columns) == 5
    assert less.columns == ("way", "kv", "vt", "all")
    assert less.rows == (("full", "-50.0", "-50.0", "-50.0"),)
    told = turn.note
    assert "before their questions were known" in told and "the wanted answers" in told
    for record in records:
        record["questions"] = "seen"
    told = job.summary(records, trained=0).panels[0].note
    assert "Query-aware in the first turn" in told and "read every question" in told
    summary = job.summary(records, trained=0)
    assert "multi_turn,kv,900,2,1.0,1" in summary.csv["multi_turn.csv"]
    assert summary.figures["multi_turn.png"].png()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("metric", "said", "wanted", "right"),
    [
        ("contains", "so ABc it is", ["ABc"], 1),
        ("contains", "so abc it is", ["ABc"], 0),
        ("contains_any_case", "(b) of course", ["(B)", "(C)"], 1),
        ("contains_all", "AB, CD", ["AB", "CD", "EF", "GH"], 0.5),
        ("number", "it is 12.0 then 5", ["12"], 1),
        ("number", "it is 3.5", ["3.5"], 1),
        ("number", "5 then 12", ["12"], 0),
        ("number", "none", ["12"], 0),
        ("choice", " B. the mill", ["B"], 1),
        ("choice", "the answer is (B)", ["B"], 1),
        ("choice", "A, not B", ["B"], 0),
        ("choice", "", ["B"], 0),
        ("qa_f1_zh", "北京", ["北京"], 1),
        ("label", "7\nlabel: 8", ["7"], 1),
        ("rouge_lsum", "the mill burned", ["A cart", "The mill; it burned!"], 6 / 7),
        ("first_digits", "It is 68129, not 5.", ["68129"], 1),
        ("first_digits", "Not 5 but 68129.", ["68129"], 0),
    ],
)
def test_answers_are_scored_by_the_kind_s_rule(metric, said, wanted, right):
    assert scbench.GRADES[metric](said, wanted) == pytest.approx(right, abs=1e-12)


CODE = {mark: eval_files.function(mark) for mark in ("amber", "cobalt")}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (CODE["amber"], 1),
        (f"Here:\n```python\n{CODE['amber']}\n```\nand\n```\nelse\n```", 1),
        (f"```\n{CODE['amber']}", 1),  # A block that is not closed is part of the text.
        (f"```\n{CODE['cobalt']}\n```\n{CODE['amber']}", 0),
        (CODE["cobalt"], 0),
        (CODE["amber"].partition("return")[0], 0),  # Likest, and not like enough.
        ("", 0),
    ],
)
def test_a_function_is_found_where_it_is_likest_and_like_enough(said, right):
    query = scbench.FunctionQuery("?", (CODE["amber"],), rivals=(CODE["cobalt"],))
    assert scbench.grade(query, said) == right


def test_a_rival_that_is_liker_takes_the_score():
    near = CODE["amber"] + " + 0"
    query = scbench.FunctionQuery("?", (CODE["amber"],), rivals=(near,))
    assert scbench.grade(query, CODE["amber"]) == 1
    assert scbench.grade(query, near) == 0


def test_the_benchmark_s_files_are_read_with_so_many_turns_and_lines(tmp_path):
    folder = eval_files.scbench(tmp_path / "scbench")
    job = MultiTurn(str(folder), turns=1, samples=1)
    examples = job.examples(Letters())
    assert [e.meta["kind"] for e in examples] == list(scbench.KINDS)
    assert all(len(e.queries) == 1 for e in examples)
    by = {e.meta["kind"]: e for e in examples}
    assert by["repoqa"].query.rivals == (eval_files.function("bronze"),)
    assert by["mf"].context == "[5, 9, 0]" and by["mf"].answers == ("8",)
    assert "B. x\nC. y" in by["choice_eng"].query.text
    assert by["vt"].query.every and by["vt"].answers == ("AMBERA", "AMBERB")
    whole = MultiTurn(str(folder), ("kv",)).examples(Letters())
    assert [len(e.queries) for e in whole] == [2, 2]
    (folder / "data").mkdir()
    (folder / "scbench_kv.jsonl").rename(folder / "data" / "scbench_kv.jsonl")
    assert MultiTurn(str(folder), ("kv",)).examples(Letters()) == whole


def test_turns_of_two_tasks_are_scored_by_their_own_and_parted(tmp_path):
    folder = str(eval_files.scbench(tmp_path / "scbench"))
    job = MultiTurn(folder, ("repoqa_and_kv", "summary_with_needles"))
    code, told = (e.queries for e in job.examples(Letters())[::2])
    assert [q.meta["kind"].partition(": ")[2] for q in (*code, *told)] == [
        "repoqa", "kv", "passkey", "summary"
    ]  # fmt: skip
    assert [q.max_new_tokens for q in (*code, *told)] == [1024, 80, 15, 800]
    assert code[0].rivals == (eval_files.function("cobalt"),)
    assert [job.grade(q, q.perfect) for q in (*code, *told)] == [1, 1, 1, 1]
    assert not any(job.grade(q, "") for q in (*code, *told))
    records = [
        dict(cache="full", strategy="whole", questions="hidden", mode="multi_turn",
             query=i, score=1.0, **{"kind": "repoqa_and_kv", **q.meta})
        for i, q in enumerate(code)
    ]  # fmt: skip
    columns = job.summary(records, trained=0).panels[1].columns
    assert columns[1:3] == ("repoqa_and_kv: repoqa", "repoqa_and_kv: kv")


@pytest.mark.parametrize(
    ("name", "turn", "words"),
    [
        ("kv", {"input": "?"}, r"multi_turns\[0\] has no field 'answer'"),
        ("kv", {"input": 3, "answer": "x"}, r"multi_turns\[0\]: input is 3"),
        ("kv", {"input": "?", "answer": ""}, "answer is ''; expected words"),
        ("kv", "what", r"multi_turns\[0\] is not a JSON object"),
        ("mf", {"input": "?", "answer": "many"}, "answer is 'many'; expected a number"),
        ("choice_eng", {"input": "?", "answer": "B"}, "no field 'options'"),
        (
            "choice_eng",
            {"input": "?", "answer": "E", "options": ["a", "b", "c", "d"]},
            r"answer is \['E'\]; neither A-D nor an option",
        ),
        ("kv", None, "line 2: multi_turns is empty"),
        ("repoqa", {"input": "?", "answer": "x"}, "no field 'name'"),
        ("repoqa_and_kv", {"input": "?", "answer": "x"}, "no field 'task'"),
        (
            "summary_with_needles",
            {"input": "?", "answer": "x", "task": "scbench_kv"},
            "task is 'scbench_kv'; expected one of scbench_summary, scbench_passkey",
        ),
    ],
)
def test_a_malformed_line_is_named_before_the_model_runs(tmp_path, name, turn, words):
    folder = eval_files.scbench(tmp_path / "scbench")
    path = folder / f"scbench_{name}.jsonl"
    first, _ = path.read_text(encoding="utf-8").splitlines()
    bad = {"context": "x", "multi_turns": [] if turn is None else [turn], "repo": "r"}
    path.write_text(f"{first}\n{json.dumps(bad)}\n", encoding="utf-8")
    lm = Echo()
    with pytest.raises(
        LclmError, match=rf"scbench_{name}.jsonl line 2.*{words}|{words}"
    ):
        MultiTurn(str(folder)).run(lm, journal=Journal(tmp_path / "m.jsonl"))
    assert lm.calls == [] and not (tmp_path / "m.jsonl").exists()


def test_bad_settings_are_refused(tmp_path):
    folder = eval_files.scbench(tmp_path / "scbench")
    (folder / "scbench_vt.jsonl").unlink()
    for settings, words in (
        (dict(tasks=("prefix",)), "kind of shared context 'prefix': known are kv, "),
        (dict(folder=str(folder), tasks=("qa",)), "kind of shared context 'qa'"),
        (dict(folder=str(folder), tasks=("vt",)), "no scbench_vt.jsonl.*there are kv"),
        (dict(folder=str(tmp_path)), "no scbench_KIND.jsonl.*there are none"),
        (dict(folder="nowhere"), "no folder 'nowhere'"),
        (dict(folder=str(folder), strategies=("oracle",)), "choose a context|oracle"),
        (dict(modes=()), "modes is empty"),
        (dict(modes=("multi_tern",)), "mode 'multi_tern'.*did you mean 'multi_turn'"),
        (dict(turns=0), "turns is 0"),
        (dict(lengths=()), "lengths is empty"),
    ):
        with pytest.raises(LclmError, match=words):
            MultiTurn(**settings)
