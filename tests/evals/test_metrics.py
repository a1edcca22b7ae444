"""Metrics agree with LongBench's own, exactly, on the vectors its packages gave."""

import json
from pathlib import Path

import pytest

from lclm.evals import metrics

GOLDEN = Path(__file__).parents[1] / "golden" / "longbench_metrics.json"
VECTORS = json.loads(GOLDEN.read_text(encoding="utf-8"))
NAMES = sorted({v["metric"] for v in VECTORS})


def scored(vector):
    name, said, wanted = vector["metric"], vector["prediction"], vector["wanted"]
    if name == "retrieval_zh":
        return metrics.retrieval(said, wanted, language="zh")
    if "classes" in vector:
        return metrics.classification(said, wanted, vector["classes"])
    score = getattr(metrics, name)
    if "words" in vector:
        return score(said, wanted, words=lambda text: vector["words"][text])
    return score(said, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_those_of_the_reference_packages_to_the_last_bit(name):
    mine = [v for v in VECTORS if v["metric"] == name]
    assert [scored(v) for v in mine] == [v["score"] for v in mine]
    assert len({v["score"] for v in mine}) > 2


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [
        ("\n\nreturn x\nmore", "return x", 1.0),
        ("```\n# why\nreturn x", "return x", 1.0),
        ("a\n\nreturn x", "return x", 0.0),  # the first line counts, not the best
        ("\nreturn y", "return x", 0.88),
        ("", "return x", 0.0),
        ("# only\n// marks", "return x", 0.0),
    ],
)
def test_code_is_the_first_line_without_marks(said, wanted, score):
    assert metrics.code_similarity(said, wanted) == score


def test_a_struck_class_shields_its_neighbour():
    classes = ["Location", "Loc", "abc"]
    assert metrics.classification("abc Location", "Location", classes) == 0.5
    assert metrics.classification("Loc", "Location", classes) == 0.0
    # "Loc" is struck out and "at", behind it, is never looked at.
    listed = ["Loc", "at", "Location"]
    assert metrics.classification("Location", "Location", listed) == 0.5


def test_the_first_line_and_what_it_holds():
    assert metrics.first_line("\n\n a b\nc") == " a b"
    assert metrics.subspan_match(" The Eiffel-Tower, of course\nParis", ["eiffeltower"])
    assert not metrics.subspan_match("\nno\nParis", ["Paris"])
    assert metrics.contains_all("alpha BETA", ["Alpha", "beta", "gamma"]) == 2 / 3
    assert metrics.contains_any("alpha", ["beta", "ALPHA"]) == 1
    assert metrics.contains_any("", ["beta"]) == 0


def test_without_jieba_chinese_is_cut_into_characters():
    assert metrics.segmenter() in ("jieba", "characters")
    assert metrics.qa_f1_zh("北京市", "北京", words=list) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [
        ("the cat sat on the mat", "The cat's mat.", 0.6),
        ("b c a b\na b x", "a b c a\nx a", 10 / 13),
        ("The mill burned, then the mayor left\nNobody stayed",
         "Nobody stayed: the mayor left\nthe mill, and the mill burned", 0.7),
        ("a b", "c d", 0),
        ("", "a b", 0),
    ],
)  # fmt: skip
def test_lines_are_summed_as_by_the_rouge_score_package(said, wanted, score):
    assert metrics.rouge_lsum(said, wanted) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [
        ("def f(x): return x + 1", "def f(x):\n  return x + 1", 1),
        ("def f(x): return x - 1", "def f(x): return x + 1", 0.537284965911771),
        ("a b c d e f", "a b c x e f", 0.293945703509473),
        ("return x", "def f(x): return x + 1", 0.029961687346935995),
        ("a b c d e f g", "a b", 0.081939171811711),
        ("q r", "a b", 0),
        ("", "a b", 0),
    ],
)
def test_likeness_of_code_is_nltk_s_smoothed_bleu(said, wanted, score):
    assert metrics.bleu(said, wanted) == pytest.approx(score, abs=1e-12)
