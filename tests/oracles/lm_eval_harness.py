"""lm-eval 0.4.13 itself: its rules as golden vectors, and runs of it on our models.

    PYTHONPATH=. python tests/oracles/lm_eval_harness.py [--check] [--model NAME]

Run in the environment of requirements-lm-eval.txt, which has no torch. Writes
tests/golden/lm_eval.json: how lm-eval cuts contexts from continuations, parts long
texts, reads generation options and scores RULER. Then lm-eval evaluates a tiny random
model, and the one named, over tasks of local JSON files: its log-likelihoods are those
of dense passes, and its answers to lclm's tasks those of lclm's own evaluations.
"""

import argparse
import json
import math
import random
import tempfile
from pathlib import Path

import lm_eval
import numpy as np
import yaml
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks.ruler.common_utils import string_match_all
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import lclm
from lclm import hub
from lclm.evals import passkey
from lclm.lm_eval import TASKS, LclmHarness
from tests.evals.lm_eval_doubles import Blocks, texts, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "lm_eval.json"


class Rules(TemplateLM):
    """lm-eval's own treatment of contexts and continuations, over `Blocks`."""

    def __init__(self, codec: Blocks):
        super().__init__()
        self.codec = codec

    eot_token_id = Blocks.bos_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.codec.encode(string, bos=add_special_tokens is None and self.bos)

    @property
    def bos(self):
        return self.codec.add_bos

    def _loglikelihood_tokens(self, requests, **_):
        return [(head, tail) for _, head, tail in requests]

    loglikelihood_rolling = generate_until = None


class Request:
    """The part of lm-eval's Instance that a model reads."""

    def __init__(self, *args):
        self.args = args


def pairs() -> list[dict]:
    """How a context and a continuation become tokens, with and without BOS."""
    rng, found = random.Random(0), []
    for number in range(60):
        bos = bool(number % 2)
        context, wanted = texts(rng)
        if not bos and context and not context.strip():
            continue  # lm-eval has no token to begin with there
        rules = Rules(Blocks(add_bos=bos))
        ((head, tail),) = rules.loglikelihood([Request(context, wanted)], True)
        told = {"context": context, "wanted": wanted, "bos": bos}
        found.append({**told, "head": head, "tail": tail})
    return found


def windows() -> list[dict]:
    """How texts longer than a model are parted."""
    found = []
    for count in (0, 1, 2, 5, 8, 9, 16, 17, 30):
        for longest in (1, 3, 8, 40):
            parted = get_rolling_token_windows(
                token_list=list(range(count)),
                prefix_token=99,
                max_seq_len=longest,
                context_len=1,
            )
            pieces = [list(make_disjoint_window(pair)) for pair in parted]
            found.append({"count": count, "longest": longest, "pieces": pieces})
    return found


def generations() -> list[dict]:
    """What generation_kwargs mean."""
    told = [
        {},
        {"until": "\n\n", "max_gen_toks": 8},
        {"until": ["a", "b"], "do_sample": False, "temperature": 0.7},
        {"do_sample": False, "temperature": 0.0, "max_new_tokens": 9},
        {"max_gen_toks": 3, "max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9},
        {"max_completion_tokens": 4, "max_tokens": 5, "until": []},
        {"do_sample": True, "temperature": 0.2, "top_k": 5},
    ]
    found = []
    for kwargs in told:
        read = normalize_gen_kwargs(dict(kwargs), 256)
        temperature = read.get("temperature", 0.0) if read["do_sample"] else 0.0
        found.append(
            {
                "told": kwargs,
                "new_tokens": read["max_gen_toks"],
                "stop": read["until"],
                "temperature": temperature,
            }
        )
    return found


def scores() -> list[dict]:
    """RULER's score of an answer."""
    rng, found = random.Random(1), []
    words = "1234567 7654321 Alpha beta GAMMA".split()
    for _ in range(20):
        said = " ".join(rng.choices([*words, "alpha", "of", "12345"], k=4))
        wanted = rng.sample(words, rng.randint(1, 4))
        score = string_match_all([said], [wanted])
        found.append({"prediction": said, "wanted": wanted, "score": score})
    return found


def dense(lm, head: list[int], tail: list[int]) -> tuple[float, bool]:
    """log p of `tail` behind `head` by one dense pass, and whether it is greedy's."""
    logits = np.asarray(lm.logits([[*head, *tail]])[0, len(head) - 1 : -1], np.float64)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    own = log_p[np.arange(len(tail)), tail].sum()
    return float(own), bool((logits.argmax(-1) == tail).all())


def write_tasks(folder: Path) -> None:
    """Three tasks over local JSON, one of each kind of request."""
    rng = random.Random(2)
    places = ["the mill", "the river", "a far hill", "the old stone bridge"]
    rows = []
    for i in range(4):
        said = " ".join(rng.choice(places) for _ in range(2 + 6 * (i % 2)))
        rows.append({"text": f"We saw {said}, and then", "label": i, "all": places})
    (folder / "rows.json").write_text(json.dumps(rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{text}}",
    }
    tasks = {
        "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{all}}",
                   "doc_to_target": "label"},
        "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "",
                    "doc_to_target": "{{text}}"},
        "answer": {"output_type": "generate_until", "doc_to_target": "the mill",
                   "generation_kwargs": {"until": ["e"], "max_gen_toks": 6}},
    }  # fmt: skip
    for name, own in tasks.items():
        task = {**shared, **own, "task": f"local_{name}"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def run(model: LclmHarness, tasks: list[str], *folders, **metadata) -> dict:
    """What lm-eval says about local tasks."""
    manager = TaskManager(include_path=list(folders), metadata=metadata)
    return lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0
    )


def check_requests(lm, **options) -> float:
    """lm-eval's log-likelihoods are those of dense passes; the largest difference."""
    model = LclmHarness(lm, **options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder)
        tasks = ["local_choice", "local_rolling", "local_answer"]
        told = run(model, tasks, folder)
    worst = 0.0
    for sample in told["samples"]["local_choice"]:
        answers = sample["filtered_resps"]
        for (context, wanted), (log_p, greedy) in zip(
            sample["arguments"], answers, strict=True
        ):
            want, own = dense(lm, *map(list, model.pair(context, wanted)))
            worst = max(worst, abs(want - float(log_p)) / abs(want))
            assert bool(greedy) is own, (context, wanted)
    total = size = 0.0
    for sample in told["samples"]["local_rolling"]:
        ((text,),) = sample["arguments"]
        want, _ = dense(lm, [model.prefix], lm.encode(text, first=False))
        got = float(sample["resps"][0][0])
        worst = max(worst, abs(want - got) / abs(want))
        total, size = total + got, size + len(text.encode())
    bits = told["results"]["local_rolling"]["bits_per_byte,none"]
    assert math.isclose(bits, -total / size / math.log(2), rel_tol=1e-9)
    for sample in told["samples"]["local_answer"]:
        prompt, _ = sample["arguments"][0]
        said = lm.generate(prompt, max_new_tokens=6, stop=["e"]).text
        assert sample["resps"][0][0] == said, (prompt, said)
    assert worst < 1e-5, worst
    return worst


def check_passkey(lm, source: str, cache: str, lengths: tuple[int, ...]) -> float:
    """lm-eval's answers to `lclm_passkey` are those of `lclm eval passkey`."""
    settings = {"lengths": list(lengths), "depths": [0.1, 0.9]}
    metadata = {"pretrained": source, "lclm_passkey": settings}
    told = run(LclmHarness(lm, cache), ["lclm_passkey"], TASKS, **metadata)
    job = passkey.Passkey(lengths=lengths, depths=(0.1, 0.9), caches=(cache,))
    found = []
    for cell in job.cells():
        example = passkey.make(
            lm.tokenizer,
            length=cell.length,
            depth=cell.depth,
            seed=cell.seed,
            starts=len(lm.encode("")),
        )
        said = lm.generate(example.prompt, max_new_tokens=10, cache=cache).text
        found.append((said, passkey.score(example, said)))
    samples = told["samples"]["lclm_passkey"]
    assert [s["resps"][0][0] for s in samples] == [said for said, _ in found]
    score = told["results"]["lclm_passkey"]["score,none"]
    assert score == sum(right for _, right in found) / len(found)
    return score


def main() -> None:
    """Write or compare the vectors, then run lm-eval."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model", help="a model to run beside the tiny one")
    args = parser.parse_args()
    found = {"pairs": pairs(), "windows": windows(), "generate": generations(),
             "ruler": scores()}  # fmt: skip
    if args.check:
        assert json.loads(GOLDEN.read_text()) == found, "the goldens have changed"
    else:
        parts = []
        for name, vectors in found.items():
            lines = ",\n".join(json.dumps(v, ensure_ascii=False) for v in vectors)
            parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
        GOLDEN.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    print(f"{sum(map(len, found.values()))} vectors of lm-eval {lm_eval.__version__}")

    tiny = tiny_model()
    for options in ({}, {"batch_size": 4}):
        print(f"tiny, {options}: relative difference {check_requests(tiny, **options)}")
    with tempfile.TemporaryDirectory() as folder:
        codec = hub.ByteTokenizer().as_tokenizer()
        hub.save_hf(folder, hub.Bundle(tiny.config, tiny.params, codec, folder))
        for cache in ("full", "streaming:sinks=4,window=60"):
            lm = lclm.load(folder)
            print(f"tiny, {cache}: passkey {check_passkey(lm, folder, cache, (400,))}")
    if args.model:
        lm = lclm.load(args.model)
        print(f"{args.model}: relative difference {check_requests(lm, batch_size=2)}")
        print(f"{args.model}: passkey {check_passkey(lm, args.model, 'full', (512,))}")


if __name__ == "__main__":
    main()
