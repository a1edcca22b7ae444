"""Laws of claims: the verdict on known numbers, and mistakes before any work."""

import csv
import io
import math
from dataclasses import replace

import pytest
from eval_doubles import Scripted
from rich.console import Console

from lclm.cli import trained
from lclm.cli.job import Choice, read_job, to_job
from lclm.cli.page import Section
from lclm.cli.run import run
from lclm.errors import LclmError
from lclm.evals.base import Panel, Summary
from lclm.evals.claims import (
    FAILED,
    REPRODUCED,
    UNDECIDED,
    Claim,
    Decision,
    Estimate,
    decide,
    paired,
    summary,
)

CLAIM = dict(
    says="Sinks help.",
    paper="arXiv 2309.17453, table 1: 9.6 against 5,158",
    measure="nll",
    low={"label": "sinks"},
    high={"label": "window"},
    stage=("Reading",),
)


def claim(**more):
    return Claim(**{**CLAIM, **more})


def verdict(low, high, **more):
    sides = (Estimate(dict(enumerate(values))) for values in (low, high))
    return Decision(claim(**more), *sides).verdict


def test_the_interval_is_student_s():
    # t(0.975, 2) = 4.302653; s = 1, n = 3
    assert math.isclose(
        Estimate({0: 1.0, 1: 2.0, 2: 3.0}).half, 2.4841377, rel_tol=1e-6
    )
    # t(0.975, 9) = 2.262157
    ten = Estimate({i: float(i) for i in range(10)})
    assert math.isclose(ten.half, 2.262157 * math.sqrt(55 / 6 / 10), rel_tol=1e-6)
    assert Estimate({0: 1.0}).half == math.inf


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        ((1.0, 1.1, 1.2), (2.0, 2.1, 2.2), REPRODUCED),
        ((2.0, 2.1, 2.2), (1.0, 1.1, 1.2), FAILED),
        ((1.0, 1.5, 2.0), (2.0, 2.5, 3.0), UNDECIDED),
        # Intervals are +- 2.4841 x s: 1 apart they touch at s = 0.2013.
        ((0.80, 1.0, 1.20), (1.80, 2.0, 2.20), REPRODUCED),
        ((0.79, 1.0, 1.21), (1.79, 2.0, 2.21), UNDECIDED),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), UNDECIDED),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), REPRODUCED),
        ((1.0, 1.0), (9.0, 9.0), UNDECIDED),
        ((1.0, 1.0, 1.0, 1.0), (9.0, 9.0), UNDECIDED),
        ((1.0,), (9.0,), UNDECIDED),
    ],
)
def test_a_verdict_needs_three_seeds_and_intervals_apart(low, high, wanted):
    assert verdict(low, high) == wanted


def test_a_margin_lets_the_low_side_be_that_much_above():
    low, high = (1.0, 1.01, 1.02), (0.9, 0.91, 0.92)
    assert verdict(low, high) == FAILED
    assert verdict(low, high, margin=0.1) == UNDECIDED
    assert verdict(low, high, margin=0.2) == REPRODUCED


def test_texts_that_both_sides_read_are_compared_within():
    # Differences 0.5, 0.6, 0.7: half = 2.4841 x 0.1 / sqrt(2); texts are 2 nats apart.
    low = Estimate({"a": 2.0, "b": 3.0, "c": 4.0})
    high = Estimate({"a": 2.5, "b": 3.6, "c": 4.7})
    assert Decision(claim(), low, high).verdict == UNDECIDED
    sides = paired(low, high)
    assert [s.mean for s in sides] == [low.mean, high.mean]
    for side in sides:
        assert side.half == pytest.approx(0.17565, abs=1e-5)
    assert Decision(claim(), *sides).verdict == REPRODUCED
    assert Decision(claim(), *reversed(sides)).verdict == FAILED


def test_models_of_the_same_start_are_the_same_seeds():
    models = ("a 0", "a 1", "a 2"), ("b 0", "b 1", "b 2")
    records = [record(0, "full", nll + s, model=model)
               for nll, names in zip((3.0, 3.5), models, strict=True)
               for s, model in enumerate(names)]  # fmt: skip
    low, high = ({"model": list(names)} for names in models)
    told = claim(low=low, high=high, seed="model")
    assert decide(told, records).verdict == UNDECIDED
    found = decide(replace(told, paired=True), records)
    assert found.verdict == REPRODUCED
    assert found.low.values == {0: 3.0, 1: 4.0, 2: 5.0}
    with pytest.raises(LclmError, match="list 3 and 2 values of 'model'"):
        claim(low=low, high={"model": ["b 0", "b 1"]}, seed="model", paired=True)


def test_seeds_or_scores_that_are_not_the_same_are_not_compared_within():
    low, other = Estimate({0: 1.0, 1: 2.0}), Estimate({2: 1.0, 3: 2.0})
    assert paired(low, other) == (low, other)
    scores = Estimate({0: 0.0, 1: 1.0}, 10)
    assert paired(low, scores) == (low, scores)


def test_scores_of_equal_seeds_have_the_interval_of_their_answers():
    # Wilson's 95% interval of 9 of 15: 0.357 to 0.802; of 0 of 15: 0 to 0.204.
    half = Estimate(dict.fromkeys(range(3), 0.6), 15)
    none = Estimate(dict.fromkeys(range(3), 0.0), 15)
    assert half.interval == pytest.approx((0.3575, 0.8018), abs=1e-4)
    assert none.interval == pytest.approx((0.0, 0.2039), abs=1e-4)
    some = Estimate(dict.fromkeys(range(3), 0.2), 15)
    assert Decision(claim(), none, half).verdict == REPRODUCED
    assert Decision(claim(), half, none).verdict == FAILED
    assert Decision(claim(), some, half).verdict == UNDECIDED
    wide = Estimate({0: 0.2, 1: 0.6, 2: 1.0}, 1500)
    assert wide.interval == (0.0, 1.0)


def test_records_of_scores_count_as_answers():
    sides = (("a", 0.0), ("b", 1.0))
    records = [dict(stage="Asked", seed=s % 3, score=v, cache=c)
               for c, v in sides for s in range(6)]  # fmt: skip
    told = dict(stage=("Asked",), measure="score")
    found = decide(claim(low={"cache": "a"}, high={"cache": "b"}, **told), records)
    assert (found.low.answers, found.high.answers) == (6, 6)
    assert found.verdict == REPRODUCED and found.low.half == 0.0


def record(seed, title, nll, **more):
    curve = [[0, 50, nll + 1, 49, 0, 0], [50, 100, nll - 1, 50, 0, 0]]
    told = dict(task="perplexity", length=100, seed=seed, title=title, tokens=99)
    return {"stage": "Reading", **told, "nll": nll, "curve": curve, **more}


RECORDS = [record(s, t, v + s / 10) for t, v in (("sinks", 3.0), ("window", 9.0))
           for s in range(3)]  # fmt: skip


def test_sides_are_picked_by_fields_and_averaged_by_seed():
    other = [record(0, "sinks", 99.0) | {"stage": "Elsewhere"}]
    longer = [record(0, "sinks", 6.0) | {"tokens": 198}]
    found = decide(claim(), RECORDS + other + longer)
    assert list(found.low.values) == [0, 1, 2]
    assert math.isclose(found.low.values[0], (3.0 * 99 + 6.0 * 198) / 297)
    assert found.high.values == {0: 9.0, 1: 9.1, 2: 9.2}
    assert decide(claim(), RECORDS).verdict == REPRODUCED
    some = claim(low={"label": "sinks", "seed": [0, 2]})
    assert list(decide(some, RECORDS).low.values) == [0, 2]
    assert decide(some, RECORDS).verdict == UNDECIDED


def test_a_span_takes_the_losses_of_its_positions():
    found = decide(claim(span=(50, 100)), RECORDS)
    assert found.low.values == {0: 2.0, 1: 2.1, 2: 2.2}
    whole = decide(claim(span=(0, 100)), RECORDS).low.values[0]
    assert math.isclose(whole, (4.0 * 49 + 2.0 * 50) / 99)


def test_the_table_has_both_sides_and_the_csv_file_every_seed():
    records = RECORDS[:3] + [record(s, "window", 9.0 + s / 5) for s in range(3)]
    made = summary([decide(claim(), records)], note="CPU-sized run: smoke.")
    (row,) = made.panels[0].rows
    assert row[:3] == (REPRODUCED, "Sinks help.", CLAIM["paper"])
    assert row[4] == "label=sinks: 3.100 [2.924, 3.276] (3 seeds)"
    assert row[6].startswith("6.10")
    assert made.panels[0].note.startswith("CPU-sized run: smoke.")
    lines = list(csv.DictReader(io.StringIO(made.csv["claims.csv"])))
    assert [(r["side"], r["seed"], r["value"]) for r in lines[:2]] == [
        ("low", "0", "3"),
        ("low", "1", "3.1"),
    ]
    assert len(lines) == 6 and {r["verdict"] for r in lines} == {REPRODUCED}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"low": {"cache": "full"}}, "no field 'cache'; they have .*curve"),
        ({"low": {"label": "sink"}}, "picks|no record.*label is 'sinks', 'window'"),
        ({"measure": "nl"}, "no field 'nl', its measure.*did you mean 'nll'"),
        ({"measure": "task"}, "task is 'perplexity'; a measure is a number"),
        ({"seed": "sed"}, "no field 'sed', its seed.*did you mean 'seed'"),
        ({"span": (40, 60)}, "none of its 3 records .*positions 40 to 60"),
    ],
)
def test_a_side_without_records_names_the_fields_they_have(more, words):
    with pytest.raises(LclmError, match=words):
        decide(claim(**more), RECORDS)


READING = dict(cache="window:window=8", label="window")
STAGE = dict(
    eval="perplexity",
    title="Reading",
    length=300,
    documents=3,
    bucket=50,
    readings=[dict(cache="full", label="full"), READING],
)
TOLD = {**CLAIM, "low": {"label": "full"}, "stage": "Reading"}


def job(**more):
    told = {**TOLD, **more}
    return dict(name="n", model="m", stages=[STAGE], claims=[told])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (job(sayz="x"), r"claims\[0\].*no option 'sayz'.*did you mean 'says'"),
        ({**job(), "claims": [{"says": "x"}]}, r"claims\[0\].*required option"),
        ({**job(), "claims": "x"}, "'claims' is 'x'; expected a list"),
        ({**job(), "claims": ["x"]}, r"claims\[0\] is 'x'; expected a table"),
        ({**job(), "size": "small"}, "size 'small': use 'smoke'"),
        (job(stage="Raeding"), "title 'Raeding'.*did you mean 'Reading'"),
        (job(low={"label": "windw"}), "label is one of 'full', 'window'.*'window'"),
        (job(low={"cache": "window"}), "cache is one of 'full', 'window:window=8'"),
        (job(low={}), r"claims\[0\]: low is empty"),
        (job(low={"label": "window"}), "the same side"),
        (job(span=[0, 60]), r"span \[0, 60\] needs .*bucket is 50"),
        (job(span=[50]), r"span is \(50,\); give \[from, to\]"),
        (job(measure="score", span=[0, 50]), "only 'nll' has positions"),
        (job(margin="x"), "margin is 'x'; expected float"),
        (
            {**job(low={"model": "b"}), "models": [{"name": "a"}]},
            "model is one of 'a'",
        ),
    ],
)
def test_a_mistake_in_a_claim_is_found_before_any_work(data, words):
    with pytest.raises(LclmError, match=words):
        to_job(data)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"name": "a", "train": "nowhere.py"}, "no config file 'nowhere.py'"),
        ({"name": "a", "train": "x.py", "source": "m"}, "with source='m'"),
        ({"name": "a", "train": "configs/smoke.py:step=3"}, "did you mean 'steps'"),
    ],
)
def test_a_mistake_in_a_model_s_training_is_found_before_any_work(model, words):
    data = {**job(), "models": [model]}
    with pytest.raises(LclmError, match=words):
        to_job(data)


CONFIG = """
def get_config(source={source!r}):
    stage = {stage!r} | dict(source=source)
    return dict(name="n", model="m", size="smoke", stages=[stage], claims=[{claim!r}])
"""


def test_a_run_decides_its_claims_on_its_page_and_in_a_file(tmp_path, source, lm):
    path = tmp_path / "small.py"
    told = {**TOLD, "low": READING | {"label": "window"}, "high": {"label": "full"}}
    path.write_text(CONFIG.format(source=source, stage=STAGE, claim=told))
    assert read_job(str(path)).claims[0].stage == ("Reading",)
    screen = Console(file=io.StringIO(), width=80)
    report = run(
        str(path),
        workdir=tmp_path / "run",
        load=lambda *a, **k: Scripted(lm.tokenizer),
        console=screen,
    )
    page, lines = report.read_text(), (report.parent / "claims.csv").read_text()
    assert "CPU-sized run: smoke." in page and "Sinks help." in page
    assert page.index("Sinks help.") < page.index("<h2>Reading")
    assert len(lines.splitlines()) == 1 + 2 * 3
    shown = screen.file.getvalue()
    assert f"\n{UNDECIDED}\n  claim: Sinks help." in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_model_may_start_from_another_of_its_job(monkeypatch, tmp_path):
    asked = []
    told = Section.of(Summary((Panel("Trained", ("model",), ()),), {}))
    monkeypatch.setattr(trained, "_section", lambda folders: told)
    monkeypatch.setattr(
        trained, "train", lambda spec, *_: asked.append(spec) or tmp_path
    )
    models = {
        "a": Choice(train="configs/smoke.py:model={models}/base/model"),
        "b": Choice("{models}/a/model", rope="ntk:factor=2"),
    }
    trained.check(models)
    found, _ = trained.train_all(models, tmp_path, Console())
    assert asked == [f"configs/smoke.py:model={tmp_path}/base/model"]
    assert found["b"].source == f"{tmp_path}/a/model"
    with pytest.raises(LclmError, match=r"'c'.*none that this job.*did you mean"):
        trained.check({**models, "c": Choice("{models}/aa/model")})


TRAINED = """
def get_config(source={source!r}):
    train = {train!r}
    seeds = [dict(name=f"tiny {{s}}", train=f"{{train}}:steps=3") for s in range(2)]
    sides = [dict(cache="full"), dict(cache="window:window=9")]
    stage = dict(eval="perplexity", title="Reading", source=source, length=100,
                 bucket=50, readings=sides)
    claim = dict(says="More sees more.", paper="none", measure="nll", stage="Reading",
                 seed="model", low=sides[0], high=sides[1])
    return dict(name="n", models=seeds, stages=[stage], claims=[claim])
"""


@pytest.mark.slow
def test_models_trained_on_demand_are_trained_once_and_told_apart(tmp_path, source):
    path = tmp_path / "own.py"
    train = tmp_path / "train.py"
    train.write_text(
        "def get_config(steps=2):\n"
        "    return dict(name='tiny', steps=steps, batch=2, length=64,\n"
        "        model=dict(source='tiny-bytes', scratch=True, tokenizer='bytes'),\n"
        f"        data=dict(source={source!r}))\n"
    )
    path.write_text(TRAINED.format(source=source, train=str(train)))
    screen = Console(file=io.StringIO(), width=200)
    folder = tmp_path / "run"
    report = run(str(path), workdir=folder, console=screen)
    models = folder / "models"
    assert sorted(p.name for p in models.iterdir()) == ["tiny-0", "tiny-1"]
    written = (models / "tiny-0" / "metrics.jsonl").read_bytes()
    lines = (folder / "claims.csv").read_text().splitlines()
    assert [line.split(",")[5] for line in lines[1:]] == ["tiny 0", "tiny 1"] * 2
    assert "Trained for this run" in report.read_text()
    measured = (folder / "metrics.jsonl").read_bytes()
    run(str(path), workdir=folder, console=screen)
    assert (folder / "metrics.jsonl").read_bytes() == measured
    assert (models / "tiny-0" / "metrics.jsonl").read_bytes() == written
    train.write_text(train.read_text().replace("batch=2", "batch=4"))
    with pytest.raises(LclmError, match="holds a run of another config"):
        run(str(path), workdir=folder, console=screen)
