"""A mixture of experts computes the chosen experts, exactly, however it is grouped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.blocks.mlp import activate
from lclm.config import LayerSpec, ModelConfig, Run, from_dict, to_dict
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.models.decoder import Decoder, init_params, param_shapes, stack_params
from lclm.models.remat import RematSpec
from lclm.ops import moe
from lclm.ops.packed import PackedWeight, pack_blocks
from lclm.specs import AttentionSpec, MoeSpec
from tests.tiny import ROPE, VOCAB, dense_nll, lively, tokens

ACT = functools.partial(activate, name="silu")
FORMS = {
    "blocks": moe._by_blocks,
    "ragged_dot": moe._by_ragged_dot,
}
EXPERTS, WIDTH, HIDDEN = 4, 16, 24


def problem(rows: int, dtype=jnp.float32, experts: int = EXPERTS):
    """Tokens, a router and experts whose results have size 1."""
    key = jax.random.split(jax.random.key(rows), 5)
    shapes = ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
    stacks = [
        jax.random.normal(k, (experts, *s), dtype) / s[1] ** 0.5
        for k, s in zip(key[2:], shapes, strict=True)
    ]
    x = jax.random.normal(key[0], (rows, WIDTH), dtype)
    router = jax.random.normal(key[1], (experts, WIDTH), dtype) / 2
    return x, router, moe.Experts(*stacks)


def value_and_grads(form, top: int = 2, renormalise: bool = False):
    def loss(x, router, experts):
        to = moe.route(x, router, top=top, renormalise=renormalise)
        y = form(x, to, experts, act=ACT)
        return jnp.sin(3 * y).sum(), y

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def assert_close(found, expected, relative: float = 2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        limit = relative * max(float(jnp.abs(b).max()), 1.0)
        assert float(jnp.abs(a - b).max()) <= limit


@pytest.mark.parametrize("rows", [1, 300])
def test_each_form_equals_all_experts_in_values_and_gradients(rows):
    arguments = problem(rows)
    expected = value_and_grads(moe.dense)(*arguments)
    for form in FORMS.values():
        assert_close(value_and_grads(form)(*arguments), expected)


@pytest.mark.parametrize("top,experts", [(1, 4), (4, 4), (3, 7)])
def test_any_number_of_experts_and_choices(top, experts):
    arguments = problem(33, experts=experts)
    found = value_and_grads(moe._by_blocks, top, True)(*arguments)
    assert_close(found, value_and_grads(moe.dense, top, True)(*arguments))


@pytest.mark.slow
def test_double_precision_stays_double():
    with jax.enable_x64(True):
        arguments = problem(21, jnp.float64)
        expected = value_and_grads(moe.dense)(*arguments)
        for form in FORMS.values():
            assert_close(value_and_grads(form)(*arguments), expected, 1e-12)


@pytest.mark.slow
def test_half_precision_rounds_once_a_product():
    x, router, experts = problem(40, jnp.bfloat16)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, router, experts))
    to = moe.route(*wide[:2], top=2, renormalise=False)
    expected = moe.dense(wide[0], to, wide[2], act=ACT)
    found = moe.grouped(x, to, experts, act=ACT)
    assert found.dtype == jnp.bfloat16
    assert float(jnp.abs(found - expected).max()) < 0.03 * float(
        jnp.abs(expected).max()
    )


def test_all_tokens_on_one_expert_are_all_computed():
    x, _, experts = problem(64)
    weights = jnp.ones((64, 1))
    to = moe.Route(weights, jnp.full((64, 1), 3), jnp.zeros((64, EXPERTS)))
    alone = ACT(x @ experts.gate[3].T) * (x @ experts.up[3].T) @ experts.down[3].T
    for form in (*FORMS.values(), moe.grouped):
        assert_close(form(x, to, experts, act=ACT), alone)


def test_weights_are_probabilities_over_all_experts_raw_or_renormalised():
    x, router, _ = problem(9)
    logits = np.asarray(x) @ np.asarray(router).T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-p, axis=-1)[:, :2]
    raw = moe.route(x, router, top=2, renormalise=False)
    np.testing.assert_array_equal(raw.choice, best)
    np.testing.assert_allclose(
        raw.weights, np.take_along_axis(p, best, 1), rtol=1e-5, atol=0
    )
    one = moe.route(x, router, top=2, renormalise=True)
    np.testing.assert_allclose(one.weights.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(one.weights, raw.weights / raw.weights.sum(-1)[:, None])


def test_packed_experts_compute_what_their_values_do():
    rng = np.random.default_rng(0)

    def pack(out: int, blocks: int) -> PackedWeight:
        codes = rng.integers(-127, 128, (EXPERTS * out, blocks, 32))
        scale = np.full((EXPERTS * out, blocks), 0.002, np.float16)
        flat = pack_blocks(codes, scale, None, 8)
        return jax.tree.map(lambda a: a.reshape(EXPERTS, out, -1), flat)

    experts = moe.Experts(pack(64, 1), pack(64, 1), pack(32, 2))
    plain = jax.tree.map(
        lambda w: w.dequantize(),
        experts,
        is_leaf=lambda leaf: isinstance(leaf, PackedWeight),
    )
    x = jax.random.normal(jax.random.key(1), (7, 32))
    to = moe.route(x, jnp.eye(EXPERTS, 32), top=2, renormalise=True)
    assert_close(moe.grouped(x, to, experts, act=ACT), moe.dense(x, to, plain, act=ACT))


def test_no_work_is_done_for_experts_nobody_chose():
    """The loop runs over blocks in use: its count is what the choices need."""
    choice = jnp.array([2, 2, 2, 5])
    blocks, (most, rows) = moe._blocks(choice, 8)
    assert (most, rows) == (8, 1)
    assert int(blocks.count) == 4
    np.testing.assert_array_equal(blocks.owner[:4], [2, 2, 2, 5])
    even = jnp.tile(jnp.arange(8), 64)
    blocks, (most, rows) = moe._blocks(even, 8)
    assert rows == 64 and int(blocks.count) == 8


def tiny_moe(layers: int = 4, **spec) -> ModelConfig:
    layer = LayerSpec(AttentionSpec(4, 2, 8, ROPE), MoeSpec(24, EXPERTS, **spec))
    return ModelConfig("mixtral", VOCAB, 32, (Run((layer,), layers),), 64)


@functools.cache
def tiny_params(layers: int = 4):
    return lively(init_params(tiny_moe(layers), jax.random.key(0)))


def collect(config, params, text, **kw):
    (hidden, _), out = Decoder(config, **kw).apply(
        {"params": params}, jnp.asarray(text), mutable=["router"]
    )
    return hidden, out["router"]


def test_parameters_are_stacked_by_expert():
    shapes = param_shapes(tiny_moe(1))
    assert shapes["layers_0/mlp/router/weight"] == (EXPERTS, 32)
    assert shapes["layers_0/mlp/experts/gate"] == (EXPERTS, 24, 32)
    assert shapes["layers_0/mlp/experts/up"] == (EXPERTS, 24, 32)
    assert shapes["layers_0/mlp/experts/down"] == (EXPERTS, 32, 24)


@pytest.mark.slow
def test_a_scan_over_layers_equals_the_unrolled_model_and_its_routers():
    config, params, text = tiny_moe(2), tiny_params(2), tokens(2, 9)
    hidden, router = collect(config, params, text)
    scanned, stacked = collect(
        config, stack_params(config, params), text, scan=True, remat=RematSpec("full")
    )
    assert_close(scanned, hidden)
    valid = jnp.arange(9)[None] < jnp.array([[9], [4]])
    for keep in (None, valid):
        assert_close(moe.aux_loss(stacked, keep), moe.aux_loss(router, keep))


@pytest.mark.slow
def test_the_load_balance_loss_is_its_formula_over_all_layers():
    config, params, text = tiny_moe(2), tiny_params(2), tokens(2, 9)
    _, router = collect(config, params, text)
    keep = np.arange(9)[None] < np.array([[9], [4]])
    chosen, mass, rows = np.zeros(EXPERTS), np.zeros(EXPERTS), 0
    for i in range(2):
        node = router[f"layers_{i}"]["mlp"]
        for b, t in zip(*np.nonzero(keep), strict=True):
            chosen[np.asarray(node["choice"][0])[b, t]] += 1
            mass += np.asarray(node["probabilities"][0])[b, t]
            rows += 1
    expected = EXPERTS * (chosen / rows * (mass / rows)).sum()
    found = moe.aux_loss(router, jnp.asarray(keep))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_even_routing_has_the_loss_of_its_number_of_choices():
    choice = jnp.stack([jnp.arange(8) % 4, (jnp.arange(8) + 1) % 4], -1)[None]
    probabilities = jnp.full((1, 8, 4), 0.25)
    layer = {"probabilities": (probabilities,), "choice": (choice,)}
    np.testing.assert_allclose(moe.aux_loss({"mlp": layer}), 2.0)


def test_descending_the_load_balance_loss_spreads_the_tokens():
    x, router, _ = problem(256)
    x, router = x + 1, router.at[0].add(0.2)

    @jax.jit
    def step(router):
        def loss(router):
            to = moe.route(x, router, top=2, renormalise=False)
            layer = {"probabilities": (to.probabilities,), "choice": (to.choice,)}
            return moe.aux_loss({"mlp": layer})

        value, slope = jax.value_and_grad(loss)(router)
        return router - 0.5 * slope, value

    values = []
    for _ in range(60):
        router, value = step(router)
        values.append(float(value))
    assert values[0] > 2.02 and values[-1] < values[0] - 0.5 * (values[0] - 2)


def test_a_model_without_experts_has_no_load_balance_loss():
    with pytest.raises(LclmError, match="mixture of experts"):
        moe.aux_loss({})


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_losses_read_in_chunks_are_those_of_one_shot(chunk):
    lm, text = LanguageModel(tiny_moe(2), tiny_params(2)), tokens(2, 11)
    found = lm.nll(text, chunk=chunk)
    np.testing.assert_allclose(found, dense_nll(lm, text), rtol=2e-4, atol=2e-4)


def test_a_mixture_survives_its_dictionary_form():
    config = tiny_moe(renormalise=True, top=3)
    assert from_dict(ModelConfig, to_dict(config)) == config


def test_more_choices_than_experts_is_an_error():
    with pytest.raises(LclmError, match="top 5 of 4"):
        MoeSpec(8, 4, top=5)
