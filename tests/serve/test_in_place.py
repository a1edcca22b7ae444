"""A decoded token writes into its cache: no policy copies what it holds."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lclm.cache import make
from lclm.cache.base import Heads, layers_of
from lclm.cache.step import make_step
from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    RopeSpec,
    find_runs,
)

SLOTS = 8192
SPEC = AttentionSpec(4, 2, 64, RopeSpec(context=SLOTS))
CONFIG = ModelConfig("llama", 97, 32, find_runs((LayerSpec(SPEC, MlpSpec(48)),)), 64)
SIZED = ("h2o", "tova", "snapkv", "knorm", "keydiff", "expected_attention")
POLICIES = (
    "full",
    "quest:budget=48,dense=0",
    f"window:window={SLOTS}",
    f"streaming:sinks=4,window={SLOTS - 4}",
    *(f"{name}:budget={SLOTS},decode=evict" for name in SIZED),
)


@pytest.mark.parametrize("name", POLICIES)
def test_a_loop_of_decoded_tokens_copies_no_cache(name):
    (layer,), policy = layers_of(CONFIG), make(name)
    cache = policy.init(layer, 1, 2 * SLOTS, jnp.float32)
    heads = Heads(*(jnp.ones((1, 1, n, 64)) for n in (4, 2, 2)))

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(cache, start):
        def body(_, state):
            cache, start = state
            at = start[:, None]
            step = make_step(CONFIG, at, start=start, far=policy.far(at))
            out, cache = policy.attend(cache, heads, step, layer)
            # The next token needs this one's output: no iteration can be dropped.
            return cache, start + 1 + (out[0, 0, 0, 0] > 1e9)

        return jax.lax.fori_loop(0, 8, body, (cache, start))

    program = decode.lower(cache, jnp.full(1, 99, jnp.int32)).compile()
    keys = max(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert program.memory_analysis().temp_size_in_bytes < keys / 2
