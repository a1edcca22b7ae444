"""How far back a fact may be: Infini-attention's memory over more and more segments.

    python experiments/infini/needle.py

A layer of 32 channels learns from scratch to tell facts: each of four keys is bound to
one of four values in the first of four segments of 8 tokens, filler follows, and every
token of the last segment asks for a key. It is then asked over up to 64 segments, with
its memory and with its gates shut (arXiv 2404.07143, equations 3 to 6). Writes
needle.csv and needle.png beside this file.
"""

import csv
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lclm.blocks.infini import GATE_RATE, is_gate
from lclm.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec, Run
from lclm.evals.claims import Estimate
from lclm.language_model import LanguageModel
from lclm.models.decoder import Decoder, init_params, unembed
from lclm.specs import InfiniSpec

BATCH = 32
# A fact binds one of KEYS to one of VALUES; the last tokens ask for keys.
KEYS, VALUES, FILL = 4, 4, 4
SEGMENT, SEGMENTS = 8, 4
DISTANCES = (1, 3, 7, 15, 31, 63)
RULES = ("linear", "delta")
Sample = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def facts(
    rng: np.random.Generator, rows: int, distance: int = SEGMENTS - 1
) -> tuple[np.ndarray, np.ndarray]:
    """A fact of each key, filler, and questions `distance` segments behind the facts.

    Tokens [rows, (distance + 1) * SEGMENT], and the values [rows, SEGMENT] asked for.
    """
    ask, fill = KEYS * VALUES, KEYS * VALUES + KEYS
    texts = fill + rng.integers(0, FILL, (rows, SEGMENT * (distance + 1)))
    where = rng.permuted(np.tile(np.arange(SEGMENT), (rows, 1)), axis=1)[:, :KEYS]
    values = rng.integers(0, VALUES, (rows, KEYS))
    at = np.arange(rows)[:, None]
    texts[at, where] = np.arange(KEYS) * VALUES + values
    keys = rng.integers(0, KEYS, (rows, SEGMENT))
    texts[:, -SEGMENT:] = ask + keys
    return texts.astype(np.int32), values[at, keys].astype(np.int32)


def model(rule: str) -> ModelConfig:
    """One layer: whatever it knows of an earlier segment went through its memory."""
    local = AttentionSpec(4, 2, 16, RopeSpec(context=64))
    layer = LayerSpec(InfiniSpec(local, SEGMENT, rule), MlpSpec(64))
    vocab = KEYS * VALUES + KEYS + FILL
    return ModelConfig("infini", vocab, 32, (Run((layer,), 1),), 64)


def optimiser(rate: float, params) -> optax.GradientTransformation:
    """AdamW; memory gates get their own rate and no weight decay."""

    def label(path, _):
        return "gate" if is_gate("/".join(key.key for key in path)) else "rest"

    kinds = {
        "gate": optax.adam(GATE_RATE),
        "rest": optax.adamw(rate, weight_decay=1e-3),
    }
    return optax.multi_transform(kinds, jax.tree_util.tree_map_with_path(label, params))


def train(
    config: ModelConfig,
    sample: Sample,
    *,
    steps: int,
    rate: float,
    scale: bool = False,
    seed: int = 0,
) -> LanguageModel:
    """A model trained from scratch to give the answers that belong to the last tokens.

    `scale` starts matrices at full scale: at 0.02 all keys look alike to a memory.
    """
    params = init_params(config, jax.random.key(seed))
    if scale:
        params = jax.tree.map(
            lambda x: x / (0.02 * x.shape[1] ** 0.5) if x.ndim == 2 else x, params
        )
    update = optimiser(rate, params)
    rng = np.random.default_rng(seed)

    def loss(params, text, answer):
        hidden, _ = Decoder(config).apply({"params": params}, text)
        logits = unembed(config, params, hidden[:, -answer.shape[1] :])
        return optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(params, state, texts, answers):
        def step(carry, batch):
            params, state = carry
            value, slopes = jax.value_and_grad(loss)(params, *batch)
            change, state = update.update(slopes, state, params)
            return (optax.apply_updates(params, change), state), value

        (params, state), values = jax.lax.scan(step, (params, state), (texts, answers))
        return params, state, values

    state = update.init(params)
    for _ in range(steps // 50):
        batches = [sample(rng, BATCH) for _ in range(50)]
        texts, answers = (jnp.asarray(np.stack(x)) for x in zip(*batches, strict=True))
        params, state, values = run(params, state, texts, answers)
        if values[-10:].mean() < 0.02:
            break
    return LanguageModel(config, params)


def recall(lm: LanguageModel, sample: Sample, rows: int = 64) -> float:
    """Share of texts continued rightly, read in chunks and decoded."""
    texts, answers = sample(np.random.default_rng(99), rows)
    made = lm.generate(texts.tolist(), 1, chunk=16)
    right = [m.tokens == [a[-1]] for m, a in zip(made, answers, strict=True)]
    return float(np.mean(right))


def shut(lm: LanguageModel) -> LanguageModel:
    """The model with its memory left out."""
    params = jax.tree.map(lambda leaf: leaf, lm.params)
    params["layers_0"]["infini"]["gate"] = jnp.full(4, -1e9)
    return LanguageModel(lm.config, params)


def measured(seeds: int) -> list[tuple[str, int, int, float]]:
    """(arm, seed, distance in segments, recall)."""
    rows = []
    for rule in RULES:
        for seed in range(seeds):
            lm = train(model(rule), facts, steps=1000, rate=1e-2, scale=True, seed=seed)
            arms = {rule: lm, f"{rule}, gates shut": shut(lm)}
            for arm, of in arms.items():
                for distance in DISTANCES:
                    found = recall(of, functools.partial(facts, distance=distance))
                    rows.append((arm, seed, distance, found))
                    print(*rows[-1], flush=True)
    return rows


def draw(rows: list[tuple[str, int, int, float]], path: Path) -> None:
    """Recall by distance: means over seeds with 95% t-intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for arm in dict.fromkeys(arm for arm, *_ in rows):
        found = [
            Estimate({s: r for a, s, d, r in rows if (a, d) == (arm, distance)})
            for distance in DISTANCES
        ]
        (line,) = axes.plot(DISTANCES, [e.mean for e in found], marker="o", label=arm)
        low, high = zip(*(e.interval for e in found), strict=True)
        axes.fill_between(DISTANCES, low, high, color=line.get_color(), alpha=0.15)
    axes.axhline(1 / VALUES, color="0.5", linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set(
        xlabel="segments between fact and question", ylabel="recall", ylim=(0, 1.05)
    )
    axes.legend()
    figure.savefig(path, dpi=110)


def main(seeds: int = 3) -> None:
    """Train, ask, write."""
    here = Path(__file__).parent
    rows = measured(seeds)
    with (here / "needle.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("arm", "seed", "distance", "recall"), *rows])
    draw(rows, here / "needle.png")


if __name__ == "__main__":
    main()
