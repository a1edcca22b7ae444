"""Laws of adapters, and of embeddings and norms trained beside them (2309.12307)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.config import LayerSpec, MlpSpec, ModelConfig, RopeSpec, find_runs
from lclm.data.batch import make_batch
from lclm.errors import LclmError
from lclm.models.decoder import Decoder, init_params, unembed
from lclm.models.lora import LoraSpec, adapters
from lclm.ops.int8 import quantize, quantize_params
from lclm.ops.linear import linear
from lclm.ops.lora import LoraWeight
from lclm.ops.packed import pack_blocks
from lclm.specs import AttentionSpec, Mamba2Spec, MambaSpec, MoeSpec
from lclm.train.config import train_config
from lclm.train.loop import Trainer
from lclm.train.state import final_params, model_params
from lclm.tree import flatten
from tests.tiny import lively, tiny_config, tokens

CONFIG = tiny_config()
UNTIED = dataclasses.replace(CONFIG, tied=False)
PLUS = (r"^embed/", r"norm")
TEXT = tokens(2, 17)
BATCH = make_batch(TEXT)


def run_of(scan=True, trains=(), head=None, on=None, rank=4):
    lora = dict(rank=rank, alpha=8) | ({} if on is None else dict(on=on))
    return train_config(
        dict(
            name="lora",
            model=dict(source="tiny", lora=lora, trains=trains, head=head),
            data=dict(source="kjv"),
            steps=3,
            batch=2,
            length=16,
            scan=scan,
            compute="float32",
            optimizer=dict(lr=1e-2, warmup=0),
        )
    )


@functools.cache
def params_of(config):
    return lively(init_params(config, jax.random.key(0)))


def moved(made: Trainer) -> dict:
    """Every parameter by path, adapters far from their start."""
    up = {p: v for p, v in made.state.params.items() if "lora" in p}
    return made.frozen | made.state.params | lively(up)


def attached(made: Trainer, flat: dict) -> np.ndarray:
    tree = model_params(made.run, flat)
    hidden, _ = made.trunk.hidden(tree, {k: jnp.asarray(v) for k, v in BATCH.items()})
    return np.asarray(hidden)


def plain(config, params) -> np.ndarray:
    out, _ = Decoder(config).apply({"params": params}, jnp.asarray(BATCH["tokens"]))
    return np.asarray(out)


def mixed(*mixers, mlp=None) -> ModelConfig:
    layers = tuple(LayerSpec(m, mlp or MlpSpec(48)) for m in mixers)
    return ModelConfig("hybrid", 97, 32, find_runs(layers), 64)


ATTENTION = AttentionSpec(4, 2, 8, RopeSpec(context=64))
CASES = {
    "attention": (CONFIG, None),
    "mamba": (mixed(MambaSpec(64, 4), ATTENTION), [r"/mamba/(in|x|dt|out)/weight$"]),
    "mamba2": (mixed(Mamba2Spec(4, 16, 16)), [r"mamba2/(in|out)/weight$"]),
    "experts": (
        mixed(ATTENTION, mlp=MoeSpec(48, 4)),
        [r"attn/[qkvo]/weight$", r"experts/(gate|up|down)$"],
    ),
}


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "attention"]


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["attention", *SLOW])
def test_zero_up_is_the_base_and_merged_is_attached(name, scan):
    config, on = CASES[name]
    made = Trainer(run_of(scan, on=on), config, params_of(config))
    base = plain(config, params_of(config))
    start = made.frozen | made.state.params
    np.testing.assert_allclose(attached(made, start), base, atol=2e-5)
    flat = moved(made)
    got = attached(made, flat)
    assert np.abs(got - base).max() > 1e-2
    merged = final_params(made.run, made.config, flat)
    np.testing.assert_allclose(plain(config, merged), got, atol=3e-4)
    assert not any("lora" in path for path in flatten(merged))


def packed_params(params: dict, form: str) -> dict:
    """The layers' matrices as 8-bit blocks of a file, or as int8 rows."""
    if form == "rows":
        layers = {k: v for k, v in params.items() if k.startswith("layers_")}
        rest = {k: v for k, v in params.items() if not k.startswith("layers_")}
        return rest | quantize_params(jax.tree.map(lambda x: x, layers), "int8")

    def pack(leaf):
        if leaf.ndim != 2 or leaf.shape[1] % 32:
            return leaf
        wide = np.asarray(leaf).reshape(leaf.shape[0], -1, 32)
        scale = (np.abs(wide).max(-1) / 127).astype(np.float16)
        codes = np.rint(wide / scale.astype(np.float32)[..., None]).clip(-127, 127)
        return pack_blocks(codes, scale, None, 8)

    layers = {
        k: jax.tree.map(pack, v) for k, v in params.items() if k.startswith("layers_")
    }
    return params | layers


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("form", ["blocks", "rows"])
def test_adapters_over_packed_matrices_train_and_merge(form, scan):
    params = packed_params(params_of(CONFIG), form)
    made = Trainer(run_of(scan), CONFIG, params)
    flat = moved(made)
    merged = final_params(made.run, made.config, flat)
    loose = 2e-2 if form == "rows" else 3e-4  # activations have 15 bits
    np.testing.assert_allclose(plain(CONFIG, merged), attached(made, flat), atol=loose)
    steps(made, 2)
    for path, leaf in made.state.params.items():
        if path.endswith("lora_up"):
            assert np.abs(leaf).max() > 0


def test_int8_rows_pass_gradients_to_their_inputs():
    x = jax.random.normal(jax.random.key(0), (3, 32))
    rows = quantize(jax.random.normal(jax.random.key(1), (8, 32)))
    slope = jax.grad(lambda x, w: jnp.sum(jnp.sin(linear(x, w))))
    np.testing.assert_allclose(slope(x, rows), slope(x, rows.dequantize()), atol=2e-2)
    assert np.abs(slope(x, rows)).max() > 0.5


def steps(made: Trainer, count: int) -> None:
    batch = {k: jnp.asarray(v) for k, v in BATCH.items()}
    step, state = jax.jit(made.stepper.__call__), made.state
    for _ in range(count):
        state, told = step(state, made.frozen, batch)
        assert np.isfinite(told["loss"])
    made.state = state


@pytest.mark.parametrize("scan", [True, False])
def test_only_adapters_embedding_and_norms_move(scan):
    params = params_of(UNTIED)
    made = Trainer(run_of(scan, trains=PLUS), UNTIED, params)
    frozen = {p: np.array(v) for p, v in made.frozen.items()}
    began = {p: np.array(v) for p, v in made.state.params.items()}
    steps(made, 3)
    for path, leaf in made.frozen.items():
        np.testing.assert_array_equal(leaf, frozen[path])
    after = made.state.params
    assert all(np.abs(after[p] - began[p]).max() > 0 for p in after)
    held = {p for p in began if "lora" not in p}
    assert held and all(p.startswith("embed/") or "norm" in p for p in held)
    assert "head/weight" in frozen


def test_the_filter_takes_what_the_paper_trains():
    made = Trainer(run_of(False, trains=PLUS), UNTIED, params_of(UNTIED))
    names = sorted(made.state.params)
    assert sum("lora" in n for n in names) == 2 * 4 * 2  # layers, q k v o, down and up
    assert sum("norm" in n for n in names) == 2 * 2 + 1
    assert sum(n.startswith("embed/") for n in names) == 1
    sizes = [v.size for n, v in made.state.params.items() if "attn/q" in n]
    assert sum(sizes) == 2 * (4 * 32 + 32 * 4)


@pytest.mark.slow
def test_a_tied_embedding_is_trained_by_choice():
    params = params_of(CONFIG)
    with pytest.raises(LclmError, match="head='trained'"):
        Trainer(run_of(trains=PLUS), CONFIG, params)
    whole = Trainer(run_of(trains=PLUS, head="trained"), CONFIG, params)
    assert whole.config.tied and "embed/table" in whole.state.params
    split = Trainer(run_of(trains=PLUS, head="frozen"), CONFIG, params)
    assert not split.config.tied
    steps(split, 2)
    table = params["embed"]["table"]
    np.testing.assert_array_equal(split.frozen["head/weight"], table)
    assert np.abs(split.state.params["embed/table"] - table).max() > 0


def test_an_untied_copy_of_the_head_changes_nothing():
    params = params_of(CONFIG)
    made = Trainer(run_of(trains=PLUS, head="frozen"), CONFIG, params)
    merged = final_params(made.run, made.config, made.frozen | made.state.params)
    text = jnp.asarray(BATCH["tokens"])
    hidden, _ = Decoder(CONFIG).apply({"params": params}, text)
    again, _ = Decoder(made.config).apply({"params": merged}, text)
    np.testing.assert_array_equal(
        unembed(CONFIG, params, hidden), unembed(made.config, merged, again)
    )


def test_a_scaled_adapter_is_alpha_over_rank():
    base, down, up = jnp.eye(3), jnp.ones((2, 3)), jnp.ones((3, 2))
    weight = LoraWeight(base, down, up, LoraSpec(rank=2, alpha=8.0).scale)
    want = np.eye(3) + 4 * np.full((3, 3), 2.0)
    np.testing.assert_array_equal(weight.dequantize(), want)
    x = jnp.asarray([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(linear(x, weight), x @ want.T)


@pytest.mark.parametrize(
    ("on", "words"),
    [
        ((r"attn/z",), "matches no parameter"),
        ((r"^embed/table",), "embed/table, which is no matrix of a projection"),
        ((r"norm1",), "no matrix of a projection"),
    ],
)
def test_adapters_where_they_cannot_be_are_refused(on, words):
    flat = flatten(params_of(CONFIG))
    with pytest.raises(LclmError, match=words):
        adapters(flat, LoraSpec(on=on), jax.random.key(0))


def test_packed_matrices_are_not_trained_whole():
    params = packed_params(params_of(CONFIG), "blocks")
    with pytest.raises(LclmError, match="is packed and cannot be trained"):
        Trainer(run_of(trains=(r"attn/q",), head="trained"), CONFIG, params)
