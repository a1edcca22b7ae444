"""Laws of asking: one reading per context, few shapes, nothing asked or lost twice."""

import pytest

from lclm.errors import LclmError
from lclm.evals.asking import Prompt, Task, answer_all, roomy, run_tasks
from lclm.evals.base import Journal, Query, silent
from lclm.evals.needle import Needle
from lclm.evals.passkey import Passkey

TEXT = "The pass key is 48151. Remember it. "


def prompts(*befores):
    query = Query("What is the pass key? The pass key is", ("48151",), 8)
    return [Prompt(before, query.text, query) for before in befores]


def kinds(lm):
    return [c[0] for c in lm.calls]


def test_neighbours_with_one_context_share_its_reading(lm):
    said = list(
        answer_all(
            lm, prompts(TEXT, TEXT, TEXT * 2, TEXT), cache="full", questions="hidden"
        )
    )
    assert all("48151" in s["prediction"] for s in said)
    one = ["prefill", "generate"]
    assert kinds(lm) == [*one, "generate", *one, *one]
    asked = [c[2] for c in lm.calls if c[0] == "generate"]
    assert [s["prompt_tokens"] for s in said] == asked


def test_a_seen_question_and_an_empty_context_are_read_as_one_text(lm):
    for questions, before in (("seen", TEXT), ("hidden", "")):
        lm.calls.clear()
        (said,) = answer_all(lm, prompts(before), cache="full", questions=questions)
        assert kinds(lm) == ["generate"]
        whole = before + prompts("")[0].after
        assert said["prompt_tokens"] == len(lm.tokenizer.encode(whole))


def test_a_start_token_that_a_template_says_itself_is_not_said_twice(lm):
    lm.start = lm.tokenizer.encode("\n")
    list(answer_all(lm, prompts("\n" + TEXT), cache="full", questions="hidden"))
    assert lm.calls[0][2] == len(lm.tokenizer.encode("\n" + TEXT))


def test_lengths_share_few_allocations_and_waste_a_quarter_at_most():
    sizes = range(1, 20_000)
    assert all(n <= roomy(n) <= max(1.25 * n + 1, n + 64) for n in sizes)
    assert len({roomy(n) for n in sizes if n > 1024}) <= 4 * 5
    assert [roomy(n) for n in (1, 64, 65, 1024, 1025)] == [64, 64, 128, 1024, 1280]


def test_contexts_of_like_length_are_given_one_allocation(lm):
    texts = [TEXT * n for n in (19, 20, 21)]
    list(answer_all(lm, prompts(*texts), cache="full", questions="hidden"))
    read = [c for c in lm.calls if c[0] == "prefill"]
    assert len({c[2] for c in read}) == 3 and len({c[3] for c in read}) == 1


def test_only_what_the_journal_lacks_is_done_and_order_is_kept(tmp_path):
    done = []

    def task(name, count):
        keys = tuple(dict(task="t", example=name, query=i) for i in range(count))

        def work(missing):
            for i in missing:
                done.append((name, i))
                if len(done) == 3:
                    raise KeyboardInterrupt
                yield {"score": i}

        return Task("t", keys, work)

    tasks, path = [task("a", 2), task("b", 3)], tmp_path / "m.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_tasks(tasks, journal=Journal(path), observe=silent)
    assert len(path.read_text().splitlines()) == 2
    heard = []
    records = run_tasks(
        tasks, journal=Journal(path), observe=lambda *told: heard.append(told)
    )
    assert done[3:] == [("b", 0), ("b", 1), ("b", 2)]
    assert [r["score"] for r in records] == [0, 1, 0, 1, 2]
    assert heard[0] == ("t", 0, 5) and heard[-1] == ("t", 5, 5)


@pytest.mark.parametrize("which", ["passkey", "needle"])
def test_hidden_questions_give_records_of_their_own_and_the_same_answers(
    lm, source, tmp_path, which
):
    def job(questions):
        if which == "passkey":
            return Passkey(lengths=(300,), depths=(0.5,), questions=questions)
        return Needle(lengths=(400,), at=(0.5,), source=source, questions=questions)

    journal = Journal(tmp_path / "m.jsonl")
    seen = job("seen").run(lm, journal=journal)
    lm.calls.clear()
    hidden = job("hidden").run(lm, journal=journal)
    assert kinds(lm) == ["prefill", "generate"]
    assert [r["score"] for r in seen] == [r["score"] for r in hidden] == [1.0]
    assert "questions" not in seen[0] and hidden[0]["questions"] == "hidden"
    note = job("hidden").summary(hidden, trained=0).panels[0].note
    assert "before their questions were known" in note
    assert "Query-aware" in job("seen").summary(seen, trained=0).panels[0].note


def test_ways_of_asking_that_do_not_exist_are_refused():
    with pytest.raises(LclmError, match="'hiden': known are hidden, seen; did you"):
        Passkey(questions="hiden")
    with pytest.raises(LclmError, match="score='forced' reads the question"):
        Passkey(score="forced", questions="hidden")
