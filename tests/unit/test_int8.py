"""Laws of int8 rows: what rounding costs, and that products cost nothing more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lclm
from lclm.config import AttentionSpec, LayerSpec, ModelConfig, Run
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.models.decoder import init_params
from lclm.ops.int8 import Int8Weight, quantize, quantize_params
from lclm.ops.linear import linear
from lclm.ops.loss import token_nll
from lclm.ops.packed import PackedWeight, dequantize, pack_blocks
from lclm.specs import MoeSpec
from tests.tiny import lively, tiny_lm, tokens


@pytest.fixture(scope="module")
def matrix():
    weight = np.random.default_rng(0).standard_normal((48, 200)).astype(np.float32)
    weight[3] *= 1000.0
    weight[5] = 0.0
    return weight


def test_a_row_is_rounded_by_half_a_step_at_most(matrix):
    kept = quantize(matrix)
    steps = np.abs(matrix).max(1, keepdims=True) / 127
    assert (np.abs(kept.dequantize() - matrix) <= steps / 2 * 1.0001).all()
    assert kept.nbytes == 48 * 200 + 48 * 4


@pytest.mark.parametrize("rows", [1, 5])
def test_a_product_keeps_fifteen_bits_of_activations(matrix, rows):
    kept = quantize(matrix)
    x = np.random.default_rng(1).standard_normal((rows, 200)).astype(np.float32)
    x[0, 7] = 300.0  # an outlier takes most of the range
    exact = x.astype(np.float64) @ np.asarray(kept.dequantize(), np.float64).T
    got = np.asarray(jax.jit(linear)(x, kept), np.float64)
    size = np.abs(x).max(1, keepdims=True) * np.linalg.norm(kept.dequantize(), axis=1)
    assert (np.abs(got - exact) <= 2**-14 * size + 1e-30).all()


def test_zero_activations_give_zero(matrix):
    assert not np.asarray(linear(jnp.zeros((2, 200)), quantize(matrix))).any()


def test_losses_over_int8_rows_are_those_of_the_dense_matrix(matrix):
    kept = quantize(matrix[:, :32])
    hidden = jax.random.normal(jax.random.key(0), (2, 6, 32)).astype(jnp.float32)
    targets = jnp.arange(12).reshape(2, 6)
    want = token_nll(hidden, kept.dequantize(), targets, chunk=4)
    np.testing.assert_allclose(
        token_nll(hidden, kept, targets, chunk=4), want, rtol=2e-3, atol=2e-2
    )


def test_a_model_of_int8_rows_is_the_model_of_the_rounded_weights():
    lm = tiny_lm()
    small = quantize_params(jax.tree.map(np.asarray, lm.params), "int8")
    dense = jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, Int8Weight) else w,
        small,
        is_leaf=lambda w: isinstance(w, Int8Weight),
    )
    text = tokens(2, 24)
    want = LanguageModel(lm.config, dense).nll(text)
    got = LanguageModel(lm.config, small).nll(text)
    np.testing.assert_allclose(got, want, atol=5e-3)
    assert isinstance(small["layers_0"]["mlp"]["down"]["weight"], Int8Weight)
    assert small["layers_0"]["norm1"]["scale"].dtype == np.float32


@pytest.mark.slow
def test_expert_stacks_are_rounded_and_routers_are_not():
    layer = LayerSpec(AttentionSpec(4, 2, 8), MoeSpec(24, 4))
    config = ModelConfig("test", 97, 32, (Run((layer,), 1),), 64)
    params = lively(init_params(config, jax.random.key(0)), 0.1)
    small = quantize_params(jax.tree.map(np.asarray, params), "int8")
    mlp = small["layers_0"]["mlp"]
    assert mlp["experts"]["down"].shape == (4, 32, 24)
    assert not isinstance(mlp["router"]["weight"], Int8Weight)
    dense = jax.tree.map(dequantize, small, is_leaf=lambda w: isinstance(w, Int8Weight))
    text = tokens(1, 12)
    want = LanguageModel(config, dense).nll(text)
    np.testing.assert_allclose(LanguageModel(config, small).nll(text), want, atol=5e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_with_packed_matrices_is_the_model_of_their_values(bits):
    lm = tiny_lm()
    rng = np.random.default_rng(0)

    def pack(shape):
        codes = rng.integers(0, 16, (shape[0], shape[1] // 32, 32))
        scale = np.full(codes.shape[:2], 0.02, np.float16)
        return pack_blocks(codes, scale, -8 * scale, bits)

    packed = dict(lm.params, embed={"table": pack((97, 32))})
    layer = dict(lm.params["layers_0"], attn=dict(lm.params["layers_0"]["attn"]))
    layer["attn"]["q"] = {"weight": pack((32, 32))}
    packed["layers_0"] = layer
    dense = jax.tree.map(
        dequantize, packed, is_leaf=lambda w: isinstance(w, PackedWeight)
    )
    text = tokens(2, 24)
    want = LanguageModel(lm.config, dense).nll(text)
    got = LanguageModel(lm.config, packed).nll(text)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_weights_are_packed_as_shipped_or_rounded_but_not_both():
    with pytest.raises(LclmError, match="give one of the two"):
        lclm.load("tests/golden/llama", packed="int8", quantize="int8")
    with pytest.raises(LclmError, match="weight form 'int3'"):
        lclm.load("tests/golden/llama", quantize="int3")
    lm = lclm.load("tests/golden/llama", quantize="int8")
    with pytest.raises(LclmError, match="load the model with"):
        lm.save("anywhere")
