"""lm-eval's requests answered as dense passes answer them; its rules by golden vectors.

lm-eval itself is not needed here: `tests/oracles/lm_eval_harness.py` runs it.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from lm_eval_doubles import Blocks, tiny_model

import lclm.lm_eval
from lclm.cli.main import main
from lclm.context import Context
from lclm.data.longbench_mini import COUNTS as MINI
from lclm.errors import LclmError
from lclm.evals import longbench_tasks, metrics, needle, passkey
from lclm.evals.passkey import Passkey
from lclm.hub.tokenizer import ByteTokenizer
from lclm.language_model import LanguageModel
from lclm.lm_eval import data
from lclm.lm_eval.answers import Answers
from lclm.lm_eval.requests import Generate, windows

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "lm_eval.json").read_text("utf-8")
)
PASS = 64  # one length, one program
MILL = "THE MILL STOOD BY THE RIVER"


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


def asks(*args):
    return SimpleNamespace(args=args)


def dense(lm, head, tail):
    """Losses of `tail` behind `head`, and which are greedy, by one dense pass."""
    text = [*head, *tail]
    logits = lm.logits([text + [0] * (PASS - len(text))])[0, len(head) - 1 :]
    logp = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tail))]
    return -logp[np.arange(len(tail)), tail], logp.argmax(-1) == tail


def answers_of(lm, **options):
    return Answers(lm, chunk=16, **options)


def test_contexts_are_cut_from_continuations_as_lm_eval_cuts_them(lm):
    assert len({len(v["head"]) for v in GOLDEN["pairs"]}) > 3
    for v in GOLDEN["pairs"]:
        codec = Blocks(add_bos=v["bos"])
        model = Answers(LanguageModel(lm.config, lm.params, codec))
        got = model.pair(v["context"], v["wanted"])
        assert got == (tuple(v["head"]), tuple(v["tail"])), v


def test_long_texts_are_parted_as_lm_eval_parts_them():
    for v in GOLDEN["windows"]:
        got = windows(range(v["count"]), first=99, longest=v["longest"])
        assert [list(piece) for piece in got] == v["pieces"], v
    assert list(windows([5, 6], first=9, longest=None)) == [([9], [5, 6])]


def test_generation_options_mean_what_they_mean_to_lm_eval():
    for v in GOLDEN["generate"]:
        got = Generate.read(v["told"], default=256)
        want = v["new_tokens"], tuple(v["stop"]), v["temperature"]
        assert (got.new_tokens, got.stop, got.temperature) == want, v


def test_the_score_of_ruler_is_that_of_lm_eval():
    for v in GOLDEN["ruler"]:
        assert metrics.contains_all(v["prediction"], v["wanted"]) == v["score"]


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_continuations_have_the_likelihood_of_a_dense_pass(lm, batch_size, monkeypatch):
    read = []
    prefill = LanguageModel.prefill
    monkeypatch.setattr(
        LanguageModel,
        "prefill",
        lambda self, rows, **kw: (read.extend(rows), prefill(self, rows, **kw))[1],
    )
    contexts = [MILL, "IT WAS LATE", MILL + " AND NOBODY CAME"]
    pairs = [(c, w) for c in contexts for w in (" AND", " I", " OR ELSE")]
    pairs += [(MILL, " AND"), (contexts[1], " 7")]
    # What greedy decoding makes is likely; the letter behind it is not.
    row = lm.encode(MILL)
    likely = int(
        jax.numpy.argmax(lm.logits([row + [0] * (PASS - len(row))])[0, len(row) - 1])
    )
    assert likely < 128
    pairs.append((MILL, chr(likely)))
    model = answers_of(lm, batch_size=batch_size)
    got = model.loglikelihood([asks(*p) for p in pairs])
    want = [dense(lm, *map(lm.encode, p)) for p in pairs]
    log_p = [-nll.sum() for nll, _ in want]
    np.testing.assert_allclose([g[0] for g in got], log_p, rtol=1e-5)
    assert [g[1] for g in got] == [hit.all() for _, hit in want]
    assert got[-1][1] and not got[0][1]
    assert len(read) == len(contexts), "a context was read twice"


def test_a_text_has_the_likelihood_of_a_dense_pass(lm):
    (got,) = answers_of(lm).loglikelihood_rolling([asks(MILL)])
    tokens = lm.encode(MILL)
    assert got == pytest.approx(-dense(lm, [256], tokens)[0].sum(), rel=1e-5)
    pieces = windows(tokens, first=256, longest=12)
    want = -sum(dense(lm, *piece)[0].sum() for piece in pieces)
    (got,) = answers_of(lm, max_length=12).loglikelihood_rolling([asks(MILL)])
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_answers_stop_at_strings_and_equal_prompts_are_asked_once(lm, monkeypatch):
    asked = []
    generate = LanguageModel.generate
    monkeypatch.setattr(
        LanguageModel,
        "generate",
        lambda self, rows, *a, **kw: (
            asked.append(len(rows)),
            generate(self, rows, *a, **kw),
        )[1],
    )
    free = lm.generate([lm.encode(MILL)], 8)[0].text
    told = {"until": [free[3]], "max_gen_toks": 8, "do_sample": False}
    model, asked[:] = answers_of(lm, batch_size=2), []
    got = model.generate_until([asks(MILL, told), asks("NO", told), asks(MILL, told)])
    assert got[0] == got[2] == free[: free.index(free[3])]
    assert asked == [2]
    drawn = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 8}
    one, two = model.generate_until([asks(MILL, drawn), asks(MILL, drawn)])
    assert one != two


@pytest.mark.slow
def test_every_policy_answers(lm):
    for cache in ("streaming:sinks=2,window=6", "recompute:window=16"):
        model = answers_of(lm, cache=cache)
        context, wanted = "IT WAS", " L"
        ((got, _),) = model.loglikelihood([asks(context, wanted)])
        text = [lm.encode(context + wanted)]
        want = -lm.nll(text, cache=cache, chunk=16)[0, -2:].sum()
        assert got == pytest.approx(want, rel=1e-5), cache
    with pytest.raises(LclmError, match="cuts a prompt"):
        answers_of(lm, cache="h2o:budget=8,at=end").loglikelihood_rolling([asks("A B")])


def test_a_model_may_be_shorter_than_its_prompts(lm):
    model = answers_of(lm, max_length=8)
    head, tail = model.pair("A LONG CONTEXT", " END")
    assert bytes(head).decode() == "NTEXT" and bytes(tail).decode() == " END"
    assert bytes(model.prompt("A LONG PROMPT", 3)).decode() == "ROMPT"
    with pytest.raises(LclmError, match="max_length is 8 and an answer may have 8"):
        model.prompt("A", 8)
    with pytest.raises(LclmError, match="10 tokens and max_length is 8"):
        model.pair("A", " CONTINUED")
    assert model.prompt("", 3) == (256,)


@pytest.mark.slow
def test_behind_a_context_tokens_are_scored_row_by_row(lm):
    rows = [lm.encode("IT WAS LATE"), lm.encode("IT")]
    context = lm.prefill(rows, chunk=16, room=16)
    behind = [lm.encode(" AND COLD"), lm.encode(".")]
    for _ in range(2):  # the context stays as it is
        found = context.score(behind)
        for row, text, (nll, greedy) in zip(rows, behind, found, strict=True):
            want, hits = dense(lm, row, text)
            np.testing.assert_allclose(nll, want, atol=3e-5)
            assert greedy.tolist() == hits.tolist()
    context.score([[], behind[0]], keep=True)
    assert context.session.start.tolist() == [len(rows[0]), len(rows[1]) + 9]
    for texts, text in (([[1]], "1 texts for 2 rows"), ([[], []], "every text")):
        with pytest.raises(LclmError, match=text):
            Context.score(context, texts)


def test_a_talk_without_a_new_turn_stays_open(lm):
    class Chatty(ByteTokenizer):
        def chat(self, messages, *, add_generation_prompt=True):
            said = "".join(f"<{m['role']}>{m['content']}</s>" for m in messages)
            return said + "<assistant>" * add_generation_prompt

    model = Answers(LanguageModel(lm.config, lm.params, Chatty(), name="a/b"))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A "}]
    assert model.apply_chat_template(talk[:1]) == "<user>Hi</s><assistant>"
    assert model.apply_chat_template(talk, False) == "<user>Hi</s><assistant>A"
    assert model.tokenizer_name.startswith("a__b-")
    assert model.tokenizer_name != Answers(lm).tokenizer_name
    assert model.chat_template(True) is None
    with pytest.raises(LclmError, match="a model has one template"):
        model.chat_template("default")


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"num_beams": 4}, "num_beams is 4"),
        ({"max_gen_tok": 4}, "did you mean 'max_gen_toks'"),
        ({"repetition_penalty": 1.2}, "'repetition_penalty' is unknown"),
    ],
)
def test_what_generation_cannot_do_is_said(told, text):
    with pytest.raises(LclmError, match=text):
        Generate.read(told, default=8)
    assert Generate.read({"do_sample": True}, default=8).temperature == 1.0


def test_a_model_is_checked_before_it_is_asked(lm):
    bare = LanguageModel(lm.config, lm.params)
    for given, options, text in (
        (bare, {}, "no tokenizer"),
        (lm, {"batch_size": 0}, "batch_size is 0"),
        (lm, {"cache": "streming"}, "did you mean 'streaming'"),
    ):
        with pytest.raises(LclmError, match=text):
            Answers(given, **options)


def test_without_lm_eval_one_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(lclm.lm_eval, "find_spec", lambda name: None)
    with pytest.raises(LclmError, match=r"pip install 'lclm\[lm-eval\]'"):
        lclm.lm_eval.LclmHarness  # noqa: B018
    assert main(["lm_eval", "--tasks", "lclm_passkey"]) == 2
    assert "lm-eval is not installed" in capsys.readouterr().err


def test_importing_the_package_imports_neither_lm_eval_nor_jax():
    code = "import lclm.lm_eval, sys; sys.exit('jax' in sys.modules or "
    code += "'lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert done.returncode == 0


class Loader(yaml.SafeLoader):
    """Reads lm-eval's task files; a function is kept as its dotted name."""


Loader.add_constructor("!function", Loader.construct_scalar)
FILES = sorted(Path(lclm.lm_eval.TASKS).glob("[a-z]*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_task_file_names_functions_settings_and_lengths_that_exist(file):
    found = yaml.load(file.read_text(), Loader)
    name = found.get("group", found["task"])
    assert name == f"lclm_{file.stem}" and name in data.SETTINGS
    for key in ("custom_dataset", "process_results"):
        assert callable(getattr(data, found[key].removeprefix("lclm.lm_eval.data.")))
    tokens = {
        "lclm_passkey": passkey.NEW_TOKENS,
        "lclm_needle": needle.NEW_TOKENS,
        "lclm_niah": 128,
    }
    if name in tokens:
        assert found["generation_kwargs"]["max_gen_toks"] == tokens[name]
        return
    assert [t["task"] for t in found["task"]] == list(MINI)
    for task in found["task"]:
        asked = longbench_tasks.DATASETS[task["dataset_kwargs"]["dataset"]]
        assert task["generation_kwargs"]["max_gen_toks"] == asked.new_tokens


def test_documents_are_the_questions_of_our_own_evaluations(monkeypatch):
    monkeypatch.setattr(data, "_read", lambda source: (ByteTokenizer(), 0))
    settings = {"lengths": [600], "depths": [0.2, 0.8]}
    told = {"pretrained": "any", "cache": "full", "lclm_passkey": settings}
    job = Passkey(lengths=(600,), depths=(0.2, 0.8))
    rows = data.passkey_rows(told)
    examples = job.examples(ByteTokenizer())
    assert [r["input"] for r in rows] == [e.prompt for e in examples]
    for row, example in zip(rows, examples, strict=True):
        right = data.score_passkey(row, [f" {example.answers[0]}."])
        assert (right, data.score_passkey(row, [""])) == ({"score": 1}, {"score": 0})
    with pytest.raises(LclmError, match="unknown setting of lclm_passkey 'lenghts'"):
        data.passkey_rows({**told, "lclm_passkey": {"lenghts": [1]}})
    with pytest.raises(LclmError, match="name the model whose tokens"):
        data.passkey_rows({})


def test_documents_of_longbench_and_ruler_are_scored_by_their_metrics(
    tmp_path, monkeypatch
):
    line = {"input": "Who?", "context": "It was Ada.", "answers": ["Ada"]}
    line |= {"length": 3, "all_classes": None, "_id": "1"}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(line) + "\n")
    told = {"lclm_longbench_mini": {"folder": str(tmp_path)}, "dataset": "hotpotqa"}
    (row,) = data.longbench_rows(told)
    assert "It was Ada." in row["input"] and row["answers"] == ["Ada"]
    assert data.score_longbench(row, ["ada lovelace"]) == {"score": 2 / 3}
    monkeypatch.setattr(data, "_read", lambda source: (ByteTokenizer(), 0))
    words = [f"{a}{b}xyz" for a in "abcdefghijk" for b in "mnopqrstuvw"]
    (tmp_path / "source.txt").write_text(" ".join(words))
    source = f"local:path={tmp_path / 'source.txt'}"
    settings = {"lengths": [900], "samples": 1, "source": source}
    told = {"pretrained": "any", "lclm_niah": settings, "task": "niah_single_1"}
    (row,) = data.niah_rows(told)
    assert len(row["input"]) + 128 <= 900 and row["answers"][0] in row["input"]
    assert data.score_niah(row, row["answers"]) == {"score": 1}
    assert math.isclose(data.score_niah(row, ["no"])["score"], 0)
