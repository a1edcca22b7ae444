"""Laws of what a run changes in the model it starts from: rope, layers, sinks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.blocks.attention import dense_attention
from lclm.cache.base import Heads
from lclm.cache.step import make_step
from lclm.config import from_dict, to_dict
from lclm.errors import LclmError
from lclm.hub.bundle import Bundle
from lclm.hub.checkpoint import load_orbax, save_orbax
from lclm.models.decoder import Decoder, init_params
from lclm.specs import InfiniSpec
from lclm.train.config import ModelSpec, Rope, train_config
from lclm.train.loop import Trainer
from lclm.train.shape import fitted, reshaped, training_config
from lclm.train.state import final_params
from tests.tiny import lively, tiny_config, tokens

CONFIG = tiny_config()  # context 64
DEEP = tiny_config(windows=(None,) * 6)
TEXT = jnp.asarray(tokens(1, 96))


def hidden(config, params, text=TEXT):
    out, _ = Decoder(config).apply({"params": params}, text)
    return np.asarray(out)


def params_of(config):
    return lively(init_params(config, jax.random.key(0)))


def run_of(**model):
    return train_config(
        dict(
            name="reshaped",
            model=dict(source="tiny", **model),
            data=dict(source="kjv"),
            steps=1,
            batch=1,
            length=96,
            compute="float32",
            scan=False,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rope", "want"),
    [
        (dict(kind="linear", context=250), dict(factor=4.0, original=64)),
        (dict(kind="ntk", context=128), dict(factor=2.0)),
        (dict(kind="yarn", context=256), dict(factor=4.0, original=64)),
        (dict(kind="yarn", factor=2.0, context=256), dict(factor=2.0)),
        (dict(theta=8e6, context=65536), dict(kind="default", theta=8e6, factor=None)),
    ],
)
def test_the_stored_model_has_the_runs_rope_and_evaluates_with_it(rope, want, tmp_path):
    made = Trainer(run_of(rope=rope), CONFIG, params_of(CONFIG))
    config = reshaped(CONFIG, made.run.model)
    spec = config.layers[1].mixer.rope
    assert {k: getattr(spec, k) for k in want} == want
    assert config.context == spec.context == rope["context"]
    flat = made.frozen | made.state.params
    params = final_params(made.run, made.config, flat)
    batch = {"tokens": TEXT, "positions": jnp.arange(96)[None]}
    batch["segments"] = jnp.ones_like(TEXT)
    trained, _ = made.trunk.hidden(params, batch)
    save_orbax(tmp_path / "model", Bundle(config, params))
    stored = load_orbax(tmp_path / "model")
    assert stored.config == config
    got = hidden(stored.config, stored.params)
    np.testing.assert_allclose(got, trained, atol=1e-5)
    assert np.abs(got - hidden(CONFIG, params)).max() > 1e-3


def test_a_longer_context_again_keeps_the_first_trained_length():
    once = reshaped(CONFIG, ModelSpec("x", rope=Rope("yarn", context=256)))
    twice = reshaped(once, ModelSpec("x", rope=Rope("yarn", context=512)))
    spec = twice.layers[0].mixer.rope
    assert (spec.original, spec.factor, spec.context) == (64, 8.0, 512)


def test_dynamic_ntk_leaves_the_trained_length_alone_and_is_ntk_behind_it():
    # Its growth at L of M tokens is factor * L / M - (factor - 1): 2 at 96 of 64.
    dynamic = reshaped(CONFIG, ModelSpec("x", rope=Rope("dynamic", factor=2.0)))
    ntk = reshaped(CONFIG, ModelSpec("x", rope=Rope("ntk", factor=2.0)))
    assert dynamic.context == dynamic.layers[0].mixer.rope.context == CONFIG.context
    params = params_of(CONFIG)
    inside = TEXT[:, : CONFIG.context]
    plain = hidden(CONFIG, params, inside)
    np.testing.assert_array_equal(hidden(dynamic, params, inside), plain)
    found, want = hidden(dynamic, params), hidden(ntk, params)
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5)
    assert np.abs(found - hidden(CONFIG, params)).max() > 1e-2


def test_position_interpolation_is_the_base_at_shrunk_positions():
    spec = ModelSpec("x", rope=Rope("linear", context=128))
    params = params_of(CONFIG)
    far = hidden(reshaped(CONFIG, spec), params, TEXT[:, :40])
    at = 2 * jnp.arange(40)[None]
    out, _ = Decoder(reshaped(CONFIG, spec)).apply(
        {"params": params}, TEXT[:, :40], positions=at
    )
    np.testing.assert_allclose(out, hidden(CONFIG, params, TEXT[:, :40]), atol=1e-5)
    assert np.abs(far - out).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "sparse"),
    [
        ("longgen:sinks=4,window=8", "window"),
        ("longgen_blocks:block=8,local=2,stride=4", "pattern"),
    ],
)
def test_longgen_keeps_weights_and_the_middle_third_full(name, sparse):
    config = reshaped(DEEP, ModelSpec("x", hybrid=name))
    kinds = [getattr(s.mixer, sparse) is not None for s in config.layers]
    assert kinds == [True, True, False, False, True, True]
    assert {s.mixer.rope for s in config.layers} == {DEEP.layers[0].mixer.rope}
    assert from_dict(type(config), to_dict(config)) == config
    params = params_of(DEEP)
    assert jax.tree.structure(fitted(config, params)) == jax.tree.structure(params)
    got = hidden(config, params)
    assert np.abs(got - hidden(DEEP, params)).max() > 1e-3


@pytest.mark.parametrize(
    ("place", "full"),
    [("bottom", [0, 1]), ("middle", [2, 3]), ("top", [4, 5]), ("spread", [1, 4])],
)
def test_longgen_puts_its_full_layers_where_it_is_told(place, full):
    spec = ModelSpec("x", hybrid=f"longgen:sinks=4,window=8,place={place}")
    layers = reshaped(DEEP, spec).layers
    assert [i for i, s in enumerate(layers) if s.mixer.window is None] == full


def test_longgen_with_everything_in_sight_is_the_base():
    config = reshaped(DEEP, ModelSpec("x", hybrid="longgen:sinks=4,window=96"))
    params = params_of(DEEP)
    np.testing.assert_allclose(hidden(config, params), hidden(DEEP, params), atol=2e-5)


@pytest.mark.slow
def test_infini_starts_as_the_base_within_one_segment():
    spec = ModelSpec("x", hybrid="infini:segment=96", rope=Rope(theta=5e4))
    config = reshaped(CONFIG, spec)
    assert all(isinstance(s.mixer, InfiniSpec) for s in config.layers)
    params = params_of(CONFIG)
    new = fitted(config, params)
    base = reshaped(CONFIG, ModelSpec("x", rope=Rope(theta=5e4)))
    np.testing.assert_allclose(hidden(config, new), hidden(base, params), atol=1e-4)
    assert "gate" in new["layers_0"]["infini"] and "attn" in params["layers_0"]


def test_a_zero_sink_is_a_key_and_value_of_zeros_and_never_moves():
    config = reshaped(CONFIG, ModelSpec("x", sink="zero"))
    made = Trainer(run_of(sink="zero"), CONFIG, params_of(CONFIG))
    assert "layers_0/attn/sink" in made.frozen
    np.testing.assert_array_equal(made.frozen["layers_0/attn/sink"], 0)
    learned = Trainer(run_of(sink="learned"), CONFIG, params_of(CONFIG))
    assert "layers_0/attn/sink" in learned.state.params
    one = dataclasses.replace(config.layers[0].mixer, rope=None)
    assert one.sink
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 6, 4, 8)) for key in keys)
    spec = dataclasses.replace(one, kv_heads=4)
    step = make_step(config, jnp.arange(6)[None])
    got = dense_attention(Heads(q, k, v), step, spec, jnp.zeros(4))
    pad = ((0, 0), (1, 0), (0, 0), (0, 0))
    k, v = jnp.pad(k, pad), jnp.pad(v, pad)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * 8**-0.5
    seen = np.tril(np.ones((6, 7), bool), 1)
    p = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
    want = jnp.einsum("bnts,bsnh->btnh", p, v, precision="highest")
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (dict(hybrid="longgan"), "did you mean 'longgen'"),
        (dict(hybrid="longgen:full=3"), "must halve"),
        (dict(hybrid="longgen:full=9,place=top"), "9 full layers of 2: 0 to 2"),
        (dict(hybrid="longgen:place=centre"), "full layers 'centre'"),
        (dict(sink="zeros"), "did you mean 'zero'"),
        (dict(head="loose"), r"unknown model\.head"),
        (dict(rope=dict(kind="yran")), "did you mean 'yarn'"),
    ],
)
def test_what_cannot_be_is_refused(model, words):
    with pytest.raises(LclmError, match=words):
        training_config(CONFIG, run_of(**model).model, 96)
