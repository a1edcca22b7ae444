"""SmolLM2-135M-Instruct itself: the figures a user will see first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lclm
from lclm import cache as policies
from lclm.blocks.layer import init_states
from lclm.cache.base import measured_bytes
from lclm.evals import passkey
from lclm.models.decoder import init_params
from lclm.models.presets import preset
from lclm.serve import calls as serve
from lclm.serve.session import Session

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lm():
    return lclm.load("smollm2-135m")


@pytest.mark.real
def test_passkeys_at_512_tokens_are_found(lm):
    for depth in (0.1, 0.5, 0.9):
        example = passkey.make(lm.tokenizer, length=512, depth=depth, seed=0)
        made = lm.generate(example.prompt, 10).text
        assert passkey.Passkey().grade(example, made) == 1


@pytest.mark.real
def test_the_preset_is_the_file(lm):
    assert lm.config == preset("smollm2-135m")


def test_temporaries_of_an_8k_prefill_stay_under_64_mb():
    config = preset("smollm2-135m")
    policy = policies.make("full")
    params, caches = jax.eval_shape(
        lambda: (
            init_params(config, jax.random.key(0)),
            init_states(config, policy, 1, 8192, jnp.float32),
        )
    )
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    lowered = serve.read_last.lower(
        {"model": params, "policy": None},
        caches,
        jax.ShapeDtypeStruct((1, config.width), jnp.float32),
        serve.Chunk(jax.ShapeDtypeStruct((1, 512), jnp.int32), row, row, row),
        how=serve.How(config, policy, jnp.float32),
    )
    assert lowered.compile().memory_analysis().temp_size_in_bytes <= 64e6


@pytest.mark.real
def test_a_streaming_cache_holds_its_budget_in_bytes(lm):
    policy = policies.make("streaming:sinks=4,window=1020")
    held = Session(lm._engine, policy, rows=1, length=40_000, chunk=512)
    per_token = 30 * (2 * 3 * 64 * 4 + 4)
    assert measured_bytes(held.caches) == 1024 * per_token
    assert np.isfinite(lm.nll([[5, 6, 7, 8]], cache=policy)).all()
