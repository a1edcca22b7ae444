"""Laws of pages: they load nothing, escape everything, and set like beside like."""

import base64
import contextlib
import csv
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from eval_doubles import Said
from page_runs import RUDE, make_run, run_like

from lclm.cli import compare
from lclm.cli.main import main
from lclm.errors import LclmError
from lclm.evals.figures import heatmap, loss_by_position, score_lines

VOID = ("meta", "link", "img", "wbr")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("pages")
    first = make_run(folder, tokenizer)
    return first, run_like(first)


@pytest.fixture(scope="module")
def page(runs):
    return (runs[0] / "report.html").read_text()


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        assert main(["compare", *map(str, runs), f"--out={out}"]) == 0
    assert "second, plain, full" in screen.getvalue()
    return out


class Tags(HTMLParser):
    """Every tag with its attributes, in a document that closes what it opens."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.said = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)

    def all(self, name):
        return [attrs for tag, attrs in self.found if tag == name]


@pytest.fixture(scope="module", params=["run", "compare"])
def tags(request, page, compared):
    text = page if request.param == "run" else (compared / "report.html").read_text()
    return Tags(text)


def test_a_page_is_well_formed_and_fit_for_phones_and_readers(tags):
    assert tags.all("html") == [{"lang": "en"}]
    metas = {m.get("name") or m.get("http-equiv"): m for m in tags.all("meta")}
    assert metas["viewport"]["content"] == "width=device-width, initial-scale=1"
    assert metas["Content-Security-Policy"]["content"].startswith("default-src 'none'")
    assert len(tags.all("title")) == len(tags.all("h1")) == len(tags.all("main")) == 1
    assert all(t["scope"] in ("row", "col") for t in tags.all("th"))
    assert all("alt" in i for i in tags.all("img"))
    assert all("aria-hidden" in s or "aria-label" in s for s in tags.all("svg"))
    assert all(d["aria-label"] for d in tags.all("div") if "role" in d)
    boxes = [d for d in tags.all("div") if d.get("class") == "wide"]
    assert len(boxes) == len(tags.all("table"))
    assert all(b["tabindex"] == "0" for b in boxes)


def test_a_page_asks_for_nothing_and_runs_nothing(tags):
    active = {"script", "iframe", "object", "base", "form"}
    assert not active & {tag for tag, _ in tags.found}
    for tag, attrs in tags.found:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, attrs)
        assert "url(" not in attrs.get("style", "")
    styles = "".join(tags.said)
    assert not re.search(r"@import|url\(|//\w+\.", styles)


def test_what_a_model_said_is_text_whatever_it_says(runs, tags):
    assert RUDE in "".join(tags.said)
    assert RUDE in [r.get("prediction") for r in records(runs[0])]


def test_scores_of_caches_that_saw_the_question_say_so(tags):
    pairs = itertools.pairwise(tags.said)
    titles = [before for before, said in pairs if said == "query-aware"]
    assert titles and all("Keys <b>" in title for title in titles)


def test_every_figure_has_a_picture_and_its_numbers_in_the_folder_and_the_page(
    runs, page, compared
):
    for folder in (runs[0], compared):
        tags = Tags((folder / "report.html").read_text())
        links = {a["download"]: a["href"] for a in tags.all("a")}
        pictures = sorted(folder.glob("*.png"))
        assert len(pictures) == len(tags.all("figure")) >= 4
        for picture in pictures:
            assert picture.read_bytes().startswith(b"\x89PNG")
            beside = picture.with_suffix(".csv")
            text = beside.read_bytes()
            assert len(list(csv.reader(io.StringIO(text.decode())))) > 1
            assert base64.b64decode(links[beside.name].partition(",")[2]) == text
        assert set(links) == {p.name for p in folder.glob("*.csv")}


def test_the_cost_table_is_what_records_tell(runs):
    rows = table(runs[0] / "cost.csv")
    at = {(r["task"], r["reading"]): r for r in rows}
    keys = at["Keys <b>", "plain, full"]
    mine = [
        r for r in records(runs[0]) if (r["task"], r["cache"]) == ("passkey", "full")
    ]
    assert int(keys["records"]) == len(mine) == 4
    assert int(keys["cache_bytes"]) == max(r["cache_bytes"] for r in mine)
    assert int(keys["tokens"]) == sum(r["prompt_tokens"] for r in mine)
    assert float(keys["tokens_per_second"]) == pytest.approx(100)
    assert float(keys["new_tokens_per_second"]) == 16
    lost = at["lost_in_the_middle", "plain, full, whole"]
    assert float(lost["tokens_per_second"]) == pytest.approx(100)
    perplexity = at["perplexity", "plain, full"]
    assert perplexity["new_tokens_per_second"] == ""
    assert int(perplexity["cache_bytes"]) == 1_050_000


def test_questions_behind_one_reading_do_not_count_it_twice():
    from lclm.evals.asking import cost
    from lclm.serve.result import Generation, Stats

    said = Generation("", [], Stats(64, None, 10, 4, 0.1, 2.0))
    assert cost(said) == {"cache_bytes": 64, "new_tokens_per_second": 2.0}
    read = Generation("", [], Stats(80, None, 1000, 0, 4.0))
    assert cost(said, read)["tokens_per_second"] == 250
    assert cost(Said("")) == {}


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_runs_are_joined_by_the_keys_of_their_records(runs, compared):
    rows = table(compared / "passkey_changes.csv")
    assert {(r["base"], r["reading"]) for r in rows} == {
        ("first, plain, full", "second, plain, full"),
        ("first, plain, full", "second, plain, h2o:budget=64"),
    }
    assert len(rows) == 2 * 4
    by_key = {}
    for run in runs:
        for r in records(run):
            by_key[run.name, r["cache"], r["task"], r["length"], r.get("depth")] = r
    for row in rows:
        at = (row["task"], int(row["length"]), float(row["depth"]))
        cache = row["reading"].rpartition(", ")[2]
        assert float(row["value"]) == by_key["second", cache, *at]["score"]
        assert float(row["base_value"]) == by_key["first", "full", *at]["score"]


def tables(folder):
    told = compare.read_runs([str(p) for p in folder])
    return {p.title: p for t in compare.in_common(told) for s in t.sections(set())
            for p in s.panels}  # fmt: skip


def test_differences_are_those_of_the_same_questions(runs, compared):
    found = tables(runs)
    same = found["second, plain, full against first, plain, full"]
    assert all(row[4:] == ("+0.0", "0", "0") for row in same.rows if len(row) == 7)
    title = "second, plain, h2o:budget=64 against first, plain, full"
    rows = [p for p in found.values() if p.title == title]
    assert rows[0].columns[:2] in (("length", "same questions"), ("part", "same texts"))
    csv_rows = [
        (float(r["base_value"]), float(r["value"]))
        for r in table(compared / "passkey_changes.csv")
        if r["reading"].endswith("h2o:budget=64")
    ]
    assert sum(b for _, b in csv_rows) < sum(a for a, _ in csv_rows)


def test_the_difference_of_losses_is_in_nats_and_its_ratio_that_of_perplexities(runs):
    from lclm.evals.pairs import Pairs

    key = dict(task="perplexity", length=8, seed=0)
    first = [0, 4, 1.0, 3]
    base = {**key, "nll": 2.0, "tokens": 7, "segments": [first, [4, 8, 2.75, 4]]}
    here = {**base, "nll": 2.1, "segments": [first, [4, 8, 2.925, 4]]}
    rows = Pairs.join(("a", [base]), ("b", [here])).panel().rows
    assert rows[0] == ("0 to 4", "1", "2.72", "2.72", "+0.000", "1.000")
    assert rows[1][4:] == ("+0.175", "1.191")
    assert rows[2] == ("all", "1", "7.39", "8.17", "+0.100", "1.105")
    other = {**here, "seed": 1}
    assert Pairs.join(("a", [base]), ("b", [other])).panel().rows == (("all", "0"),)


def test_a_comparison_overlays_curves_and_sets_heatmaps_side_by_side(runs, compared):
    told = compare.read_runs([str(p) for p in runs])
    perplexity, keys, *_ = compare.in_common(told)
    (chart,) = perplexity.sections(set())[0].figures.values()
    assert list(chart.lines) == [
        f"{run}, plain, {cache}"
        for run, caches in (
            ("first", ("full", "streaming:sinks=4,window=60")),
            ("second", ("full", "h2o:budget=64")),
        )
        for cache in caches
    ]
    maps = keys.sections(set())[0].figures.values()
    assert len(maps) == 4 and all(m.scores.shape == (2, 2) for m in maps)


def test_speeds_of_different_machines_are_not_set_against_each_other(runs):
    told = compare.read_runs([str(p) for p in runs])
    assert "different machines" not in compare.costs_of(told).panels[0].note
    told["second"].facts["processor"] = "another"
    assert "different machines" in compare.costs_of(told).panels[0].note


def test_two_stages_of_one_kind_keep_files_of_their_own():
    from lclm.evals.base import Panel, Summary

    figure = score_lines({"a": [(1, 0.5)]}, across="tokens")
    panel = Panel("t", ("a",), ())
    summary = Summary((panel,), {"a.png": figure}, {"b.csv": "x"})
    assert summary.apart({"c.csv"}) == summary
    assert summary.apart({"b.csv", "b-2.csv"}).tables().keys() == {"a-3.csv", "b-3.csv"}


def test_figures_keep_every_number_in_their_csv():
    import numpy as np

    scores = np.array([[0.5, np.nan]])
    grid = heatmap(scores, lengths=(8, 16), depths=(0.25,), title="t")
    assert grid.csv() == "length,depth,score\n8,0.25,0.5\n"
    chart = loss_by_position({'a "b", c': [[0, 4, 1.5, 3, 1.25, 2.0]]}, trained=4)
    assert chart.csv() == 'line,x,y,low,high\n"a ""b"", c",2.0,1.5,1.25,2.0\n'
    assert chart.marks == {"trained for 4": 4.0}


def test_what_is_no_run_or_has_nothing_in_common_is_an_error(runs, tmp_path, capsys):
    first = str(runs[0])
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "train.json").write_text("{}")
    torn = tmp_path / "torn"
    shutil.copytree(runs[0], torn)
    old = tmp_path / "old"
    shutil.copytree(runs[0], old)
    (old / "run.json").unlink()
    (torn / "run.json").write_text('{"title": 1}')
    for told, words in (
        ([first, "nowhere"], "'nowhere' is not the folder of a run: there is no such"),
        ([first, str(trained)], "it holds a training run"),
        ([first, str(old)], "its command again writes one"),
        ([first, str(torn)], "run.json is damaged"),
        ([first, first], "two runs have the name 'first'.*other="),
        ([f"={first}", first], "names nothing before '='"),
        ([first], "takes at least two"),
        ([first, f"a={runs[1]}", "--out", first], "holds a run itself"),
    ):
        assert main(["compare", *told]) == 2
        assert re.search(words, capsys.readouterr().err)


def test_a_record_that_is_gone_is_named(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(LclmError, match=r"1 of 2 records that run\.json names are not"):
        compare.read_runs([str(runs[0]), str(copy)])


def test_only_the_same_task_asked_the_same_way_is_compared(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    data = json.loads((copy / "run.json").read_text())
    data["stages"] = [s for s in data["stages"] if s["eval"] == "passkey"]
    data["stages"][0]["settings"]["questions"] = "hidden"
    (copy / "run.json").write_text(json.dumps(data))
    told = compare.read_runs([str(runs[0]), str(copy)])
    with pytest.raises(LclmError, match=r"no task in common \(first: .*copy: passkey"):
        compare.in_common(told)
