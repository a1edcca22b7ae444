"""Many choices of full heads, one compiled pass: what `evaluate.py` asks, by masks.

    python experiments/duo_gates/masks.py 2048
    python experiments/duo_gates/masks.py 1024 --sparsities .5 --trials 3 --depths .1 .3

A prompt and its key are read in one parallel pass in which each kv head sees what its
cache would hold: the rule of `duo`, which equals it token by token
(tests/serve/test_duo.py). No memory is saved and nothing is timed here; a key counts
where every one of its tokens is the likeliest. "sinks and window" is `duo` without full
heads and with the window that costs the same bytes: StreamingLLM, but for positions.
Every row is a line of masks.jsonl and is not asked again. results.csv: the claims that
the rows of this length and the last sparsity decide, a seed being a draw of keys.
"""

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lclm
from lclm.blocks.attention import dense_attention
from lclm.cache.duo import Duo
from lclm.data.fetch import write_atomic
from lclm.evals import passkey
from lclm.evals.claims import Claim, decide, summary
from lclm.models.decoder import stack_params, unembed
from lclm.models.trunk import Trunk

RESULTS = Path(__file__).with_name("masks.jsonl")
SINKS, WINDOW, TAIL = 64, 256, 8
TRAINED = "duo, trained"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masked:
    """Attention over everything for full heads, over sinks and a window for others."""

    sinks: int = field(metadata={"static": True})
    window: int = field(metadata={"static": True})

    def __call__(self, layer, heads, step, sink):
        spec, step = layer.spec, replace(step, probe=None)
        near = replace(spec, sinks=self.sinks, window=self.window + 1)
        full = layer.get_variable("params", "probe")["full"]
        chosen = jnp.repeat(full, spec.heads // spec.kv_heads)[:, None]
        whole = dense_attention(heads, step, spec, sink)
        return jnp.where(chosen, whole, dense_attention(heads, step, near, sink))


def reader(lm, length: int):
    """(probe, gates, tokens, first) -> float32 [TAIL, V]: logits from `first` on."""
    trunk = Trunk(lm.config)
    params = stack_params(lm.config, lm.params)

    @jax.jit
    def read(probe, full, tokens, first):
        batch = {
            "tokens": tokens,
            "positions": jnp.arange(tokens.shape[1], dtype=jnp.int32)[None],
            "segments": jnp.ones_like(tokens),
        }
        hidden, _ = trunk.probed(params, batch, probe, {"full": full})
        last = jax.lax.dynamic_slice_in_dim(hidden[0], first, TAIL)
        return unembed(lm.config, params, last)

    def ask(probe, full, prompt: list[int], key: list[int]):
        tokens = np.zeros((1, length + TAIL), np.int32)
        tokens[0, : len(prompt) + len(key)] = prompt + key
        logits = read(probe, full, tokens, len(prompt) - 1)[: len(key)]
        logp = jax.nn.log_softmax(logits)[np.arange(len(key)), np.array(key)]
        return float(logp.sum()), bool((jnp.argmax(logits, -1) == np.array(key)).all())

    return ask


def choices(lm, length: int, sparsity: float):
    """(name, probe, full heads [L, K]) of every policy; sparsity 0 is "full"."""
    duo = Duo(SINKS, WINDOW, sparsity)
    drawn = {f"random {i}": replace(duo, gates=f"random:{i}") for i in range(3)}
    found = {"trained": duo} | drawn
    heads = {
        name: np.array(each.resolve(lm.config)[0].heads) for name, each in found.items()
    }
    size, full = heads["trained"].size, int(heads["trained"].sum())
    share = WINDOW + full * (length - SINKS - WINDOW) // size
    none = np.zeros_like(heads["trained"])
    if not sparsity:
        yield "full", Masked(SINKS, WINDOW), ~none
        return
    for name, chosen in heads.items():
        yield f"duo, {name}", Masked(SINKS, WINDOW), chosen
    yield "sinks and window", Masked(SINKS, share), none


def claims(records: list[dict], length: int, sparsity: float) -> None:
    """Print and write what the rows of one length and sparsity decide."""
    told = f"{length} tokens, sparsity {sparsity}"
    mine = [{**r, "stage": told} for r in records if r["length"] == length
            and r["sparsity"] in (0.0, sparsity)]  # fmt: skip
    better = {
        "Trained gates choose better heads than chance.": (
            [f"duo, random {i}" for i in range(3)],
            "a control of ours: three random choices of half the heads",
        ),
        "At equal bytes DuoAttention finds what sinks and a window have dropped.": (
            "sinks and window",
            "arXiv 2410.10819: LongBench 40.2 against 32.3 (Llama-3-8B)",
        ),
    }
    decisions = [
        decide(
            Claim(says, paper, measure, {"name": low}, {"name": TRAINED}, (told,)), mine
        )
        for says, (low, paper) in better.items()
        for measure in ("log_p", "score")
    ]
    words = "Half the heads are enough: a key is as likely within half a nat."
    paper = "arXiv 2410.10819: LongBench 40.2 against 40.1 in full (Llama-3-8B)"
    sides = {"name": "full"}, {"name": TRAINED}
    whole = Claim(words, paper, "log_p", *sides, (told,), margin=0.5)
    found = summary([*decisions, decide(whole, mine)])
    write_atomic(RESULTS.with_name("results.csv"), found.csv["claims.csv"])
    for row in found.panels[0].rows:
        print(*row, sep=" | ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("length", type=int)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument(
        "--depths", type=float, nargs="+", default=[0.1, 0.5, 0.3, 0.7, 0.9]
    )
    args = parser.parse_args()
    lm = lclm.load("smollm2-135m")
    ask = reader(lm, args.length)
    done = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    fields = ("name", "length", "sparsity", "depth", "seed")
    keys = {tuple(json.loads(line)[f] for f in fields) for line in done}
    sides = [
        (*side, sparsity)
        for sparsity in (0.0, *args.sparsities)
        for side in choices(lm, args.length, sparsity)
    ]
    for seed in range(args.trials):
        for depth in args.depths:
            asked = passkey.make(
                lm.tokenizer, length=args.length, depth=depth, seed=seed
            )
            prompt = lm.encode(asked.prompt)
            whole = lm.encode(asked.prompt + " " + asked.answers[0])
            for name, probe, full, sparsity in sides:
                about = (name, args.length, sparsity, depth, seed)
                if about in keys:
                    continue
                log_p, hit = ask(probe, full, prompt, whole[len(prompt) :])
                found = {"log_p": round(log_p, 3), "score": float(hit)}
                told = dict(zip(fields, about, strict=True)) | found
                with RESULTS.open("a") as out:
                    out.write(json.dumps(told) + "\n")
                print(*told.values(), flush=True)
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    claims(records, args.length, args.sparsities[-1])


if __name__ == "__main__":
    main()
