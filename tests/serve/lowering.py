"""The engine's compiled calls for platforms that are not here, nothing allocated."""

from typing import Any

import jax
import jax.numpy as jnp

from lclm.blocks.layer import init_states
from lclm.cache import make
from lclm.config import ModelConfig
from lclm.models.decoder import param_shapes
from lclm.ops.sampling import Sampler
from lclm.serve import calls
from lclm.tree import nest
from pallas_kernels import dispatch


def engine_calls(
    config: ModelConfig,
    cache: str,
    platform: str,
    *,
    length: int,
    chunk: int,
    place: Any = None,
    chip: str | None = None,
    spread: bool = False,
) -> tuple[jax.stages.Traced, jax.stages.Traced]:
    """What reads `chunk` of `length` tokens, and what decodes; one row in bfloat16."""
    policy, _ = make(cache).fitted(config, jnp.bfloat16, length).resolve(config)

    def like(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    flat = {p: like(s, jnp.bfloat16) for p, s in param_shapes(config).items()}
    weights = {"model": nest(flat), "policy": None}
    states = jax.eval_shape(
        lambda: init_states(config, policy, 1, length, jnp.bfloat16)
    )
    caches = jax.tree.map(lambda x: like(x.shape, x.dtype), states)
    how = calls.How(config, policy, jnp.bfloat16, spread)
    one, last = like((1,), jnp.int32), like((1, config.width), jnp.bfloat16)
    text = calls.Chunk(like((1, chunk), jnp.int32), one, one, one)
    rows = calls.Rows(caches, last, one, like((1,), bool))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    limit, options = like((), jnp.int32), {"sampler": Sampler(), "steps": 8}
    with dispatch.target(platform, chip):
        return (
            calls.read_last.trace(weights, caches, last, text, how=how),
            calls.decode.trace(weights, rows, keys, limit, one, how=how, **options),
        )
