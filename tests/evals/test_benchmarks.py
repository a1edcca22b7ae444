"""Benchmarks' own files in, their rules kept, every fault named before a model runs."""

import gzip
import json
import re
from collections import Counter

import eval_files
import pytest
from eval_doubles import Letters, Scripted

from lclm.data import qa
from lclm.errors import LclmError
from lclm.evals import longbench_v2, metrics
from lclm.evals.base import Journal
from lclm.evals.longbench import LongBench
from lclm.evals.longbench_tasks import BUCKETS, DATASETS, bucket
from lclm.evals.longbench_v2 import LongBenchV2
from lclm.evals.lost_in_the_middle import LostInTheMiddle, build_kv
from lclm.evals.ruler import Ruler, make, weighted
from lclm.evals.ruler_tasks import TASKS, Sample, Source


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    monkeypatch.setattr(qa, "_member", eval_files.questions)


@pytest.fixture
def folder(tmp_path):
    return eval_files.longbench(tmp_path / "longbench")


def run(job, lm, tmp_path):
    return job.run(lm, journal=Journal(tmp_path / "m.jsonl"))


def test_the_table_is_longbench_s():
    assert len(DATASETS) == 21
    extended = {n for n, d in DATASETS.items() if d.extended}
    assert len(extended) == 13 and all(DATASETS[n].language == "en" for n in extended)
    few = {n for n, d in DATASETS.items() if d.few_shot}
    assert few == {"trec", "triviaqa", "samsum", "lsht"}
    bare = {n for n, d in DATASETS.items() if not d.chat}
    assert bare == few | {"lcc", "repobench-p"}
    assert Counter(d.category for d in DATASETS.values()) == {
        "single-document QA": 4,
        "multi-document QA": 4,
        "summarisation": 4,
        "few-shot": 4,
        "synthetic": 3,
        "code": 2,
    }
    assert all(d.prompt.count("{context}") == 1 for d in DATASETS.values())
    assert [bucket(n) for n in (3999, 4000, 7999, 8000)] == [
        "0-4k", "4-8k", "4-8k", "8k+",
    ]  # fmt: skip


def test_a_folder_s_own_prompts_and_lengths_take_the_place_of_ours(folder, tokenizer):
    (folder / "config").mkdir()
    prompts = {"hotpotqa": "<<{context}>> {input} ->"}
    (folder / "config" / "dataset2prompt.json").write_text(json.dumps(prompts))
    (folder / "config" / "dataset2maxlen.json").write_text('{"hotpotqa": 5}')
    first, *_ = LongBench(str(folder), ("hotpotqa",)).examples(tokenizer)
    assert first.opening == "<<" and len(first.queries) == 2
    assert first.queries[1].text == ">> What of bronze in hotpotqa? ->"
    assert first.queries[0].max_new_tokens == 5


def test_scores_are_means_of_datasets_then_of_categories(folder, lm, tmp_path):
    job = LongBench(str(folder), ("hotpotqa", "2wikimqa", "trec", "lsht"), limit=2)
    records = run(job, lm, tmp_path)
    wanted = {"hotpotqa": (1, 0), "2wikimqa": (1, 1), "trec": (0.5, 0), "lsht": (1, 0)}
    for record in records:
        record["score"] = wanted[record["dataset"]][record["query"]]
    assert job.summary(records, trained=0).panels[0].title == "LongBench"
    rows = dict(job.summary(records, trained=0).panels[0].rows)
    assert rows["hotpotqa"] == "50.00" and rows["trec"] == "25.00"
    assert rows["multi-document QA (en)"] == "75.00"
    assert rows["all (en)"] == "50.00" and rows["all (zh)"] == "50.00"
    csv = job.summary(records, trained=0).csv["longbench.csv"].splitlines()
    assert csv[:2] == ["way,dataset,metric,bucket,score,n",
                       "full,hotpotqa,qa_f1,all,50.0,2"]  # fmt: skip


def test_lines_that_changed_are_asked_again_and_the_others_are_not(
    folder, lm, tmp_path
):
    job = LongBench(str(folder), ("gov_report",))
    run(job, lm, tmp_path)
    path = folder / "data" / "gov_report.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("(1)", "(9)"))
    lm.calls.clear()
    run(job, lm, tmp_path)
    assert [c[0] for c in lm.calls] == ["prefill", "generate"]


def test_extended_scores_fall_into_buckets_and_an_empty_one_is_a_dash(
    folder, lm, tmp_path
):
    job = LongBench(str(folder), ("lcc",), extended=True)
    records = run(job, lm, tmp_path)
    for record in records:
        record["score"] = float(record["length"] < 4000)
    (panel,) = job.summary(records, trained=0).panels
    assert panel.columns == ("dataset", *BUCKETS)
    assert panel.rows == (("lcc", "100.00", "0.00", "-"),)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ({"context": 5}, "line 2: context is 5; expected str"),
        ({"answers": []}, r"line 2: answers is \[\]; expected a list of strings"),
        ({"answers": None}, "line 2: answers is None; expected list"),
        ({"length": True}, "line 2: length is True; expected int"),
        ({"all_classes": None}, None),
        ({"input": ...}, "line 2 has no field 'input'; needed are input, context"),
    ],
)
def test_a_malformed_line_is_named_before_the_model_runs(
    folder, lm, tmp_path, line, words
):
    path = folder / "data" / "hotpotqa.jsonl"
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    if isinstance(line, dict):
        row = {**json.loads(second), **line}
        line = json.dumps({k: v for k, v in row.items() if v is not ...})
    path.write_text(f"{first}\n{line}\n", encoding="utf-8")
    job = LongBench(str(folder), ("hotpotqa",))
    if words is None:
        assert len(run(job, lm, tmp_path)) == 2
        return
    with pytest.raises(LclmError, match=f"hotpotqa.jsonl {words}"):
        run(job, lm, tmp_path)
    assert lm.calls == [] and not (tmp_path / "m.jsonl").exists()


def test_classes_and_paragraph_labels_are_checked_too(folder, lm, tmp_path):
    for name, change, words in (
        ("trec", {"all_classes": None}, "all_classes is .*expected a list"),
        ("passage_retrieval_en", {"answers": ["7"]}, "they name no paragraph"),
    ):
        row = {**eval_files.longbench_line(name, 0), **change}
        path = folder / "data" / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(LclmError, match=f"{name}.jsonl line 1.*{words}"):
            run(LongBench(str(folder), (name,)), lm, tmp_path)


def test_folders_and_datasets_that_are_not_there_are_named(folder, tmp_path):
    (folder / "data" / "lsht.jsonl").unlink()
    for settings, words in (
        (dict(folder=str(tmp_path / "no")), "no folder"),
        (dict(folder=str(tmp_path)), "has no dataset.jsonl.*there are none"),
        (
            dict(folder=str(folder), datasets=("lsht",)),
            "has no lsht.jsonl.*narrativeqa",
        ),
        (dict(folder=str(folder), datasets=("qmsun",)), "did you mean 'qmsum'"),
        (dict(folder=str(folder), strategies=("oracle",)), "no strategy 'oracle'"),
        (dict(folder=str(folder), limit=-1), "limit is -1"),
    ):
        with pytest.raises(LclmError, match=words):
            LongBench(**settings)
    (folder / "dataset2prompt.json").write_text('{"hotpotqa": "no place"}')
    with pytest.raises(LclmError, match=r"prompt of hotpotqa needs one \{context\}"):
        LongBench(str(folder)).items()


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("The correct answer is (B)", "B"),
        ("**The correct answer is** (C), not (A)", "C"),
        ("The correct answer is D.", "D"),
        ("The correct answer is A but The correct answer is (B)", "B"),
        ("(A)", None),
        ("", None),
    ],
)
def test_a_choice_is_read_in_brackets_first(said, letter):
    assert longbench_v2.choice(said) == letter


def test_v2_counts_an_unreadable_answer_as_a_guess_where_compensated(lm, tmp_path):
    job = LongBenchV2(str(eval_files.longbench_v2(tmp_path / "data.json")))
    records = run(job, lm, tmp_path)
    for i, record in enumerate(records):
        right = i == 0
        record["score"] = float(right)
        record["prediction"] = "The correct answer is (A)" if i < 2 else "none"
    plain, paid = job.summary(records, trained=0).panels
    assert plain.rows[0][1] == "25.0"
    assert dict(zip(paid.columns, paid.rows[0], strict=True)) == {
        "way": "full", "all": "37.5", "easy": "62.5", "hard": "12.5",
        "short": "62.5", "medium": "0.0", "long": "25.0",
    }  # fmt: skip
    rows = json.loads((tmp_path / "data.json").read_text())
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert len(LongBenchV2(str(lines)).items()) == 4
    rows[2]["answer"] = "E"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(LclmError, match=r"data.json question 3: answer is 'E'"):
        job.items()


def test_genuine_keys_and_values_keep_their_object_and_move_their_gold(tmp_path):
    file = eval_files.kv_retrieval(tmp_path / "kv.jsonl.gz")
    job = LostInTheMiddle("kv", file=str(file), places=(0, 5), strategies=("whole",))
    examples = job.examples(Letters())
    assert len(examples) == 6
    for example in examples:
        pairs = json.loads(example.context)
        at = list(pairs).index(example.query.asked)
        assert len(pairs) == 6 and at == example.meta["place"]
        assert pairs[example.query.asked] == example.answers[0]
        lines = example.context.splitlines()
        assert lines[0][0] == "{" and all(x.startswith(" ") for x in lines[1:])
    assert job.grade(examples[0].query, examples[0].answers[0].upper()) == 1


def test_built_keys_are_distinct_and_of_the_seed():
    (first, second), (other, _) = build_kv(20, 2, 0), build_kv(20, 2, 1)
    pairs = [first.gold, *first.others]
    assert len(set(pairs)) == 20 and first.gold not in (second.gold, other.gold)
    assert build_kv(20, 2, 0)[0] == first
    assert re.fullmatch(r'"[0-9a-f-]{36}": "[0-9a-f-]{36}"', first.gold)


@pytest.mark.parametrize("distractors", ["hard", "easy"])
def test_documents_around_the_gold_have_no_answer_and_its_place_is_asked(
    tmp_path, distractors
):
    file = eval_files.nq_open(tmp_path / "nq.jsonl.gz")
    job = LostInTheMiddle(
        file=str(file), total=5, places=(0, 4), limit=2, distractors=distractors
    )
    for example in job.examples(Letters()):
        lines = example.context.splitlines()
        assert [x.split("]")[0] for x in lines] == [
            f"Document [{i}" for i in range(1, 6)
        ]
        plain = [metrics.normalize(x) for x in lines]
        holds = [metrics.normalize(example.answers[0]) in x for x in plain]
        assert [i for i, h in enumerate(holds) if h] == [example.meta["place"]]
        assert len(set(lines)) == 5
    own = eval_files.nq_open(tmp_path / "four.jsonl.gz", documents=4)
    (first, *_) = LostInTheMiddle(file=str(own), limit=1).examples(Letters())
    assert len(first.context.splitlines()) == 4


def test_the_curve_has_its_bounds_and_they_are_asked_once(tokenizer, tmp_path):
    file = eval_files.kv_retrieval(tmp_path / "kv.jsonl.gz")
    job = LostInTheMiddle("kv", file=str(file), places=(0, 3, 5), limit=2)
    lm = Scripted(tokenizer)
    records = run(job, lm, tmp_path)
    asked = Counter(r["strategy"] for r in records)
    assert asked == {"closed_book": 2, "whole": 6, "oracle": 2}
    for record in records:
        told = {"closed_book": 0.0, "oracle": 1.0}
        record["score"] = told.get(record["strategy"], float(record["place"] == 0))
    summary = job.summary(records, trained=0)
    (panel,) = summary.panels
    assert summary.figures["lost_in_the_middle.png"].png()[:4] == b"\x89PNG"
    rows = {row[0]: row[1:] for row in panel.rows}
    assert panel.columns == ("way", "at 0", "at 3", "at 5", "all", "skipped")
    assert rows["whole"] == ("100.0", "0.0", "0.0", "33.3", "0")
    assert rows["closed_book"][0] == "0.0" and rows["oracle"][0] == "100.0"


def test_faults_of_lost_in_the_middle_are_named(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"ordered_kv_records": [["a", "b"]], "key": "c", "value": "d"}\n')
    with pytest.raises(LclmError, match="line 1: its key and value are no pair"):
        LostInTheMiddle("kv", file=str(path)).asked()
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(LclmError, match=r"x.jsonl.gz cannot be read .*fetch it again"):
        LostInTheMiddle("kv", file=str(path)).asked()
    with pytest.raises(LclmError, match="'qb': known are kv, qa"):
        LostInTheMiddle("qb")
    with pytest.raises(LclmError, match=r"places \[7\] are outside"):
        LostInTheMiddle("kv", total=5, places=(7,))
    small = eval_files.nq_open(tmp_path / "nq.jsonl.gz", lines=3)
    with pytest.raises(LclmError, match="9 documents without an answer are wanted"):
        LostInTheMiddle(file=str(small), total=10).asked()


@pytest.fixture(scope="module")
def words():
    return Source.of(eval_files.prose())


@pytest.mark.parametrize("task", TASKS)
def test_every_ruler_task_holds_its_answers_and_one_unit_more_is_too_long(
    task, words, tokenizer
):
    for seed in (0, 1):
        sample = Sample(words, 2000, seed)
        example = make(tokenizer, task, sample, starts=3)
        units, query = example.meta["units"], example.query
        new = query.max_new_tokens
        assert len(tokenizer.encode(example.prompt)) + 3 + new <= 2000
        more = TASKS[task](sample)(units + 1)
        if more is None:
            assert task in ("qa_1", "qa_2")
        else:
            assert len(tokenizer.encode(more.prompt)) + 3 + new > 2000
        assert query.text.endswith(query.start) and query.start
        for answer in query.answers:
            assert answer in example.context
            assert answer not in example.opening + query.text


def test_ruler_s_counts_are_the_paper_s(words, tokenizer):
    def built(task, length=2000):
        return make(tokenizer, task, Sample(words, length, 0))

    common = Counter(re.findall(r"\d+\. (\w+)", built("cwe").context))
    assert sorted(common.values())[-10:] == [6] * 10 and min(common.values()) == 1
    assert {w for w, n in common.items() if n == 6} == set(built("cwe").answers)
    long = Counter(re.findall(r"\d+\. (\w+)", TASKS["cwe"](Sample(words, 4096, 0))(7)
                              .context))  # fmt: skip
    assert sorted(long.values()) == [3] * 7 + [30] * 10
    coded = Counter(built("fwe").context.split()).most_common(4)
    assert coded[0][0] == "..." and [w for w, _ in coded[1:]] == list(
        built("fwe").answers
    )
    chain = [x for x in built("vt").context.splitlines() if x.startswith("VAR")]
    assert len(chain) == 5 and re.fullmatch(r"VAR [A-Z]{5} = \d{5}", chain[0])
    needles = {
        "niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1,
        "niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4,
    }  # fmt: skip
    for task, count in needles.items():
        assert built(task).context.count("special magic") == count
    for task in ("niah_multikey_2", "niah_multikey_3"):
        found = re.findall(r"for (\S+) is", built(task).context)
        assert len(found) == len(set(found)) > 10
    assert len(built("niah_multiquery").answers) == 4


def test_the_effective_length_is_the_longest_that_still_counts(lm, source, tmp_path):
    job = Ruler((4096, 8192, 16384), ("vt", "fwe"), source=source)
    scores = {4096: 0.9, 8192: 0.86, 16384: 0.8}
    records = [
        dict(ruler=task, length=n, score=score, cache="full", strategy="whole")
        for n, score in scores.items()
        for task in job.tasks
    ]
    first, by_task = job.summary(records, trained=0).panels
    assert job.summary(records, trained=0).figures["ruler.png"].png()[:4] == b"\x89PNG"
    assert first.rows == (("full", "90.0", "86.0", "80.0", "83.7", "87.0", "8,192"),)
    assert [row[0] for row in by_task.rows] == ["vt", "fwe"]
    for record in records:
        record["score"] = 0.5
    assert job.summary(records, trained=0).panels[0].rows[0][-1] == "under 4,096"


@pytest.mark.parametrize(
    ("means", "rising", "falling"),
    [
        ((96.7, 95.8, 96.0, 95.9, 95.9, 94.4), 95.5, 96.1),  # Gemini-1.5-pro
        ((96.6, 96.3, 95.2, 93.2, 87.0, 81.2), 89.0, 94.1),  # GPT-4-1106-preview
    ],
)
def test_weighted_averages_are_those_that_ruler_published(means, rising, falling):
    assert [round(x, 1) for x in weighted(means)] == [rising, falling]
    assert weighted((0.5, None)) == (None, None)


def test_bad_settings_of_ruler_are_refused(source, tokenizer, words):
    for settings, said in (
        (dict(lengths=()), "lengths is empty"),
        (dict(tasks=("nih",)), "unknown RULER task 'nih'"),
        (dict(samples=0), "samples is 0"),
        (dict(strategies=("oracle",)), "cwe, fwe are answered by all of their text"),
    ):
        with pytest.raises(LclmError, match=said):
            Ruler(source=source, **settings)
    with pytest.raises(LclmError, match=r"too short: the prompt without any filler"):
        make(tokenizer, "vt", Sample(words, 100, 0))
    with pytest.raises(LclmError, match="fewer than 100 words"):
        Source.of("few words here")
