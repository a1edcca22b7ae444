"""Runs on fake devices against one device; imported by processes of the tests."""

import dataclasses
import functools

import jax
import numpy as np

from lclm.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, Run
from lclm.data.batch import make_batch
from lclm.models.decoder import init_params
from lclm.specs import InfiniSpec, Mamba2Spec, MambaSpec, MoeSpec
from lclm.train.config import TrainConfig, train_config
from lclm.train.loop import Trainer
from tests.tiny import ROPE, VOCAB, lively, tokens

ROWS, LENGTH = 8, 32


def attention(heads: int = 4, kv_heads: int = 2, **spec) -> LayerSpec:
    mixer = AttentionSpec(heads, kv_heads, 8, ROPE, **spec)
    return LayerSpec(mixer, MlpSpec(48))


def model(*group: LayerSpec, tied: bool = True, repeats: int = 1) -> ModelConfig:
    stack = (Run(group, repeats),)
    return ModelConfig("llama", VOCAB, 32, stack, 64, tied=tied)


MODELS = {
    "plain": lambda: model(attention(), repeats=2),
    "dressed": lambda: model(
        attention(qk_norm=True, qkv_bias=True, out_bias=True, sink=True), tied=False
    ),
    "mqa": lambda: model(attention(kv_heads=1)),
    "wide": lambda: model(attention(heads=8, kv_heads=4)),
    "window": lambda: model(attention(window=4)),
    "mixed": lambda: model(attention(window=4), attention()),
    "sinks": lambda: model(attention(window=4, sinks=2)),
    "s2": lambda: model(attention(pattern="shifted_groups:group=8")),
    "s2rows": lambda: model(attention(pattern="shifted_groups:group=8", laid="rows")),
    "moe": lambda: model(
        LayerSpec(AttentionSpec(4, 2, 8, ROPE), MoeSpec(24, 4, 2)), repeats=2
    ),
    "mamba": lambda: model(
        LayerSpec(MambaSpec(64, 4), MlpSpec(48)), attention(), repeats=1
    ),
    "mamba2": lambda: model(
        LayerSpec(Mamba2Spec(4, 16, 8, chunk=16), MlpSpec(48)), attention(window=4)
    ),
    "infini": lambda: model(
        LayerSpec(InfiniSpec(AttentionSpec(4, 2, 8, ROPE), segment=8), MlpSpec(48))
    ),
}
RUN = dict(
    name="tiny",
    model=dict(source="tiny"),
    data=dict(source="kjv"),
    steps=4,
    batch=ROWS,
    length=LENGTH,
    compute="float32",
    loss_chunk=16,
    optimizer=dict(lr=1e-2),
)


def run_of(**changes) -> TrainConfig:
    return train_config(RUN | changes)


def batch(packed: bool = True) -> dict:
    """Rows of documents that end at other places in each row, and some padding."""
    rows = tokens(ROWS, LENGTH + 1)
    if not packed:
        return make_batch(rows)
    segments = np.ones((ROWS, LENGTH + 1), np.int32)
    for i in range(ROWS):
        segments[i, 3 + 2 * i :] = 2
        segments[i, LENGTH - 7 :] = 3
        segments[i, LENGTH - i :] = 0
    return make_batch(rows, segments)


def trainer(name: str, run: TrainConfig) -> Trainer:
    config = MODELS[name]()
    made = Trainer(run, config, lively(init_params(config, jax.random.key(0))))
    if run.model.lora is not None:  # fresh adapters change nothing
        state = made.state
        params = {
            p: v + 0.1 * jax.random.normal(jax.random.key(i), v.shape)
            for i, (p, v) in enumerate(sorted(state.params.items()))
        }
        if made.layout is not None:
            params = made.layout.place(params)
        made.state = dataclasses.replace(state, params=params)
    return made


def gradients(made: Trainer, rows: dict) -> tuple[dict, dict]:
    step = made.stepper
    found = jax.jit(step.gradients)(made.state.params, made.frozen, made.place(rows))
    return jax.tree.map(np.asarray, found)


@functools.cache
def alone(name: str, packed: bool, settings: str) -> tuple[dict, dict]:
    run = run_of(**eval(settings))
    return gradients(trainer(name, run), batch(packed))


def same(name: str, mesh: dict, *, packed: bool = True, **changes) -> None:
    """Loss, companions and gradients on a mesh equal those on one device."""
    told, want = alone(name, packed, repr(changes))
    made = trainer(name, run_of(mesh=mesh, **changes))
    other, got = gradients(made, batch(packed))
    label = f"{name} {mesh} packed={packed} {changes}"
    for key in told:
        np.testing.assert_allclose(
            other[key], told[key], rtol=1e-5, atol=1e-6, err_msg=f"{label} {key}"
        )
    assert want.keys() == got.keys()
    for path, leaf in want.items():
        np.testing.assert_allclose(
            got[path],
            leaf,
            rtol=1e-5,
            atol=1e-5 * max(1e-1, np.abs(leaf).max()),
            err_msg=f"{label} {path}",
        )
    print("same:", label)
