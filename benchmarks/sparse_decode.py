"""What a decoded token costs in LongGen's block-sparse layers beside full attention.

    python -m benchmarks.sparse_decode [--lengths 32768 131072] [--rounds 9]

Attention layers of SmolLM2-135M's shape (9 query and 3 kv heads of 64) behind a cache
that holds the length less the tokens decoded, all kinds in turn. Writes
benchmarks/results/sparse_decode.json.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.compare import cpu_model
from lclm import cache as policies
from lclm.blocks.attention import layer_mask
from lclm.blocks.layer import init_states
from lclm.config import AttentionSpec, LayerSpec, ModelConfig, RopeSpec, Run
from lclm.models.decoder import Decoder, init_params
from lclm.models.hybrid_presets import BLOCKS

RESULTS = Path(__file__).parent / "results"
FULL = AttentionSpec(9, 3, 64, RopeSpec(context=131072))
KINDS = {
    "full": FULL,
    "blocks": dataclasses.replace(FULL, pattern=BLOCKS.format(kv_heads=3)),
}


def model(spec: AttentionSpec, layers: int) -> ModelConfig:
    """Nothing but attention layers."""
    stack = (Run((LayerSpec(spec, None),), layers),)
    return ModelConfig("bench", 256, 576, stack, 131072)


def filled(config: ModelConfig, length: int, count: int, dtype: str) -> tuple:
    """Caches as they are after `count` tokens."""
    states = init_states(config, policies.make("full"), 1, length, dtype)

    def fill(kv):
        slots = jnp.arange(kv.k.shape[2])
        pos = jnp.where(slots < count, slots, -1)
        k, v = (jax.random.normal(jax.random.key(n), kv.k.shape, dtype) for n in (1, 2))
        return dataclasses.replace(kv, k=k, v=v, pos=pos[None, None].astype(jnp.int32))

    def layer(cache):
        return dataclasses.replace(cache, groups=tuple(map(fill, cache.groups)))

    return jax.tree.map(layer, states, is_leaf=lambda x: hasattr(x, "groups"))


def decoder(config: ModelConfig, steps: int):
    """A compiled loop over one-token calls: (params, caches, start) -> caches."""
    run = Decoder(config, policies.make("full"))

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params, caches, start):
        def one(n, carry):
            caches, total = carry
            at = start + n
            token = (at % 256).reshape(1, 1)
            hidden, caches = run.apply(
                {"params": params}, token, token * 0 + at, None, caches,
                start=at[None],
            )  # fmt: skip
            return caches, total + hidden.sum()

        return jax.lax.fori_loop(0, steps, one, (caches, jnp.float32(0)))

    return decode


def main() -> None:
    """Run and write the JSON."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    flags.add_argument("--layers", type=int, default=2)
    flags.add_argument("--steps", type=int, default=16)
    flags.add_argument("--rounds", type=int, default=9)
    flags.add_argument("--dtype", default="float32")
    args = flags.parse_args()
    found = {}
    for length in args.lengths:
        count, runs = length - args.steps, {}
        for name, spec in KINDS.items():
            config = model(spec, args.layers)
            params = init_params(config, jax.random.key(0))
            caches = filled(config, length, count, args.dtype)
            runs[name] = [decoder(config, args.steps), params, caches]
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(args.rounds + 1):
            for name, (decode, params, caches) in runs.items():
                began = time.perf_counter()
                caches, total = decode(params, caches, jnp.int32(count))
                jax.block_until_ready(total)
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - began))
                runs[name][2] = caches
        least = {name: min(t) / args.steps / args.layers for name, t in times.items()}
        found[length] = {
            name: {
                "ms_a_token_and_layer": round(least[name], 3),
                "over_full": round(least[name] / least["full"], 3),
                "keys_seen": layer_mask(spec).pairs(1, length, 9, length - 1) // 9,
            }
            for name, spec in KINDS.items()
        }
        print(length, found[length], flush=True)
    data = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "jax": jax.__version__,
        "settings": vars(args),
        "lengths": found,
    }
    path = RESULTS / "sparse_decode.json"
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
