"""Laws of what is kept between the passes: the same numbers, only the named arrays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from lclm.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec, Run
from lclm.errors import LclmError
from lclm.models.decoder import Decoder, init_params
from lclm.models.remat import PRESETS, RematSpec

LAYER = LayerSpec(AttentionSpec(2, 1, 8, RopeSpec(context=64)), MlpSpec(48))
CONFIG = ModelConfig("llama", 50, 16, (Run((LAYER,), 2),), context=64)
TOKENS = jnp.arange(32, dtype=jnp.int32)[None]


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def loss_of(remat):
    model = Decoder(CONFIG, remat=remat)

    def loss(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, TOKENS)[0]))

    return loss


@pytest.fixture(scope="module")
def want(params):
    return jax.jit(jax.value_and_grad(loss_of(RematSpec())))(params)


@pytest.mark.parametrize(
    "remat",
    [RematSpec(kind) for kind in PRESETS if kind != "none"]
    + [RematSpec("full", save=("gate",), offload=("layer_input", "q"))],
    ids=str,
)
def test_gradients_are_those_of_keeping_everything_bit_for_bit(remat, params, want):
    found = jax.jit(jax.value_and_grad(loss_of(remat)))(params)
    jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize(
    ("remat", "kept", "moved"),
    [
        (RematSpec("full"), 0, 0),
        (RematSpec("attention"), 4, 0),  # outputs, log-sum-exps
        # q, k, v, o, gate, up beside them
        (RematSpec("products"), 2 * (2 + 6), 0),
        (RematSpec("attention_offload"), 4, 2),
        (RematSpec("offload"), 0, 2 + 2 + 2),  # inputs, outputs, log-sum-exps
        (RematSpec("full", save=("gate", "up")), 4, 0),
        (RematSpec("full", save=("gate",), offload=("up",)), 2, 2),
    ],
    ids=str,
)
def test_just_the_named_arrays_are_kept(remat, kept, moved, params, capsys):
    print_saved_residuals(loss_of(remat), params)
    lines = capsys.readouterr().out.splitlines()
    names = [m[1] for line in lines if (m := re.search(r"named '(\w+)'", line))]
    assert len(names) == kept, lines
    assert sum("device_put" in line for line in lines) == moved, lines


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: RematSpec("ful"), "did you mean 'full'"),
        (lambda: RematSpec("full", save=("gat",)), "did you mean 'gate'"),
        (lambda: RematSpec("none", offload=("gate",)), "'none' keeps everything"),
        (lambda: RematSpec("full", ("q",), ("q",)), "in save and in offload"),
    ],
)
def test_a_name_that_is_not_known_is_refused(made, words):
    with pytest.raises(LclmError, match=words):
        made()
