"""Laws of every generator: exact length, one needle, determinism, gold and empty."""

import pytest
from eval_doubles import PROSE
from hypothesis import given, settings
from hypothesis import strategies as st

from lclm.data.haystack import fit, insertion_point, repeat_to, sentence_enders
from lclm.errors import LclmError
from lclm.evals import EVALS, needle, passkey
from lclm.evals.needle import Haystack, Needle
from lclm.evals.passkey import FILLER, Passkey

SIZES = st.integers(200, 1500)
DEPTHS = st.integers(0, 100).map(lambda d: d / 100)
SEEDS = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack.build(tokenizer, PROSE, count=1600)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=60),
    limit=st.integers(0, 300),
    guess=st.integers(-5, 80),
)
def test_fit_is_the_last_size_within_the_limit(sizes, limit, guess):
    totals = [sum(sizes[:n]) for n in range(len(sizes) + 1)]

    def size(n):
        return totals[n] if n < len(totals) else 10**6

    found = fit(size, limit, guess=guess)
    assert size(found) <= limit < size(found + 1)


def test_fit_refuses_a_limit_below_the_bare_prompt():
    with pytest.raises(LclmError, match=r"length 5 .* takes 9; use .* at least 9"):
        fit(lambda n: 9 + n, 5, guess=0)


@settings(max_examples=40, deadline=None)
@given(length=SIZES, depth=DEPTHS, seed=SEEDS)
def test_passkey_length_is_within_one_sentence_below_the_target(
    tokenizer, length, depth, seed
):
    example = passkey.make(tokenizer, length=length, depth=depth, seed=seed)
    tokens = len(tokenizer.encode(example.prompt))
    unit = max(len(tokenizer.encode(" " + s)) for s in FILLER) + 2
    assert length - unit < tokens <= length
    assert tokens == example.meta["prompt_tokens"]
    assert example.prompt.count(f"The pass key is {example.answers[0]}") == 1
    assert 10000 <= int(example.answers[0]) <= 99999
    overhead = len(tokenizer.encode(passkey.OPENING + passkey.QUESTION)) + 40
    assert abs(example.meta["actual_depth"] - depth) <= overhead / length + 0.02


@settings(max_examples=40, deadline=None)
@given(length=SIZES, depth=DEPTHS, seed=SEEDS)
def test_needle_length_is_within_one_token_below_the_target(
    tokenizer, haystack, length, depth, seed
):
    example = needle.make(tokenizer, haystack, length=length, depth=depth, seed=seed)
    tokens = len(tokenizer.encode(example.prompt))
    assert length - 3 <= tokens <= length
    assert tokens == example.meta["prompt_tokens"]
    assert example.context.count(example.meta["needles"][0]) == 1
    assert example.prompt.count(example.answers[0]) == 1


@settings(max_examples=25, deadline=None)
@given(depth=DEPTHS, seed=SEEDS, needles=st.integers(2, 5))
def test_every_needle_is_present_once_and_in_depth_order(
    tokenizer, haystack, depth, seed, needles
):
    example = needle.make(
        tokenizer, haystack, length=1200, depth=depth, seed=seed, needles=needles
    )
    lines, actual = example.meta["needles"], example.meta["actual_depths"]
    assert [example.context.count(line) for line in lines] == [1] * needles
    assert actual == sorted(actual)
    for i, found in enumerate(actual):
        assert abs(found - (depth + i * (1 - depth) / needles)) < 0.25
    assert len(set(example.answers)) == needles
    assert len(tokenizer.encode(example.prompt)) <= 1200


@settings(max_examples=30, deadline=None)
@given(depth=DEPTHS, seed=SEEDS)
def test_needle_starts_a_sentence_and_the_text_around_it_is_untouched(
    tokenizer, haystack, depth, seed
):
    example = needle.make(tokenizer, haystack, length=900, depth=depth, seed=seed)
    line = example.meta["needles"][0]
    body = example.context.removeprefix(needle.OPENING)
    left, right = body.split(line)
    if left and right.strip():
        assert left.rstrip().rstrip("\"')").endswith((".", "!", "?"))
    assert " ".join(PROSE.split()).startswith(" ".join((left + right).split()))
    assert abs(example.meta["actual_depth"] - depth) < 0.15


def test_a_period_inside_the_text_is_found_whatever_encoding_a_lone_one_gives():
    pieces = {0: "<s>", 1: "▁.", 2: "end.", 3: 'said."', 4: " and", 5: "Really?)"}
    ids = [0, 4, 2, 4, 4, 3, 4, 5, 4, 4]
    enders = sentence_enders(ids, lambda i: pieces[i[0]])
    assert enders == {2, 3, 5}
    assert insertion_point(ids, 0.5, enders=enders) == 3
    assert insertion_point(ids, 1.0, enders=enders) == len(ids)
    assert insertion_point(ids, 0.0, enders=enders) == 0


def test_without_a_sentence_end_nearby_the_place_does_not_move():
    assert insertion_point([4] * 4000, 0.5, enders=frozenset()) == 2000
    assert insertion_point([4] * 800, 0.5, enders=frozenset()) == 0


def test_haystack_is_said_again_until_long_enough():
    assert repeat_to([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(LclmError, match="no tokens"):
        repeat_to([], 3)


SMALL = {
    "passkey": dict(lengths=(300, 500), depths=(0.0, 0.5, 1.0), trials=2),
    "needle": dict(lengths=(400, 700), points=3, needles=2),
}


def build(name, source):
    options = dict(SMALL[name])
    return EVALS[name](**options, **({"source": source} if name == "needle" else {}))


@pytest.mark.parametrize("name", sorted(SMALL))
def test_same_seed_same_examples_other_seed_other_examples(name, tokenizer, source):
    job = build(name, source)
    first, second = job.examples(tokenizer), job.examples(tokenizer)
    assert first == second
    moved = type(job)(**{**job.__dict__, "seed": 99}).examples(tokenizer)
    assert [e.answers for e in moved] != [e.answers for e in first]


@pytest.mark.parametrize("name", sorted(SMALL))
def test_perfect_answer_scores_one_and_empty_answer_zero(name, tokenizer, source):
    job = build(name, source)
    for example in job.examples(tokenizer):
        assert job.grade(example, " " + ", ".join(example.answers) + ".") == 1
        assert job.grade(example, "") == 0
        assert job.grade(example, "I do not know, 1 or 2.") == 0


def test_passkey_scores_the_first_run_of_digits_only(tokenizer):
    example = passkey.make(tokenizer, length=300, depth=0.5, seed=0)
    key = example.answers[0]
    assert passkey.score(example, f" {key}.") == 1
    assert passkey.score(example, f" 7 and {key}") == 0
    assert passkey.score(example, f" {key}1") == 0


def test_needle_scores_the_share_found_and_strict_only_the_first_line(
    tokenizer, haystack
):
    example = needle.make(tokenizer, haystack, length=900, depth=0.2, seed=1, needles=4)
    three = ", ".join(example.answers[:3])
    assert needle.score(example, three) == 0.75
    assert needle.score(example, "well\n" + three) == 0.75
    assert needle.score(example, "well\n" + three, mode="strict") == 0


def test_sigmoid_spacing_rises_is_symmetric_and_crowds_the_ends():
    linear, curve = needle.depths(11), needle.depths(11, spacing="sigmoid")
    assert linear == tuple(i / 10 for i in range(11))
    assert list(curve) == sorted(curve)
    assert (curve[0], curve[5], curve[-1]) == (0, 0.5, 1)
    for low, high in zip(curve, reversed(curve), strict=True):
        assert low + high == pytest.approx(1, abs=1e-5)
    assert curve[2] - curve[1] < linear[2] - linear[1] < curve[5] - curve[4]
    assert curve[1] == 0.01799


def test_stratified_depths_fall_one_in_each_slice():
    job = Passkey(lengths=(300,), bins=5, trials=3)
    drawn = [c.depth for c in job.cells()]
    assert len(set(drawn)) == 15
    for trial in range(3):
        part = drawn[5 * trial : 5 * trial + 5]
        assert [int(d * 5) for d in part] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Passkey(lengths=()), "lengths is empty"),
        (lambda: Passkey(lengths=(0,)), "length is 0.*at least 1"),
        (lambda: Passkey(depths=(1.5,)), "depth is 1.5.*allowed is 0"),
        (lambda: Passkey(score="nearly"), "'nearly'; allowed are"),
        (lambda: Passkey(trials=0), "trials is 0"),
        (lambda: Passkey(caches=()), "caches is empty"),
        (lambda: Passkey(caches=("full", "full")), "twice"),
        (lambda: Needle(spacing="log"), "'log'; allowed are"),
        (lambda: Needle(needles=99), "needles is 99; allowed is 1 to 16"),
        (lambda: Needle(mode="judge"), "'judge'; allowed are"),
    ],
)
def test_bad_settings_are_refused_with_value_and_remedy(make, words):
    with pytest.raises(LclmError, match=words):
        make()


def test_a_length_below_the_bare_prompt_names_the_least(tokenizer, haystack):
    with pytest.raises(LclmError, match=r"length 20 tokens is too short.*at least"):
        passkey.make(tokenizer, length=20, depth=0.5, seed=0)
    with pytest.raises(LclmError, match=r"length 20 tokens is too short.*at least"):
        needle.make(tokenizer, haystack, length=20, depth=0.5, seed=0)
