"""The complex EMA of megalodon-jax, timed on request.

Run by an environment with `megalodon-jax` 0.2.2 alone; see `benchmarks/cema.py`. Each
line read is "packed" or "plain"; the answer is a JSON line: seconds of one forward and
backward pass, bytes of temporaries, and a sum of outputs and slopes to compare.
"""

import importlib.metadata
import json
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from megalodon_jax.layers.complex_ema import ComplexEMA


def main() -> None:
    given = np.load(sys.argv[1])
    x = jnp.asarray(given["x"].swapaxes(1, 2))
    cotangent = jnp.asarray(given["cotangent"].swapaxes(1, 2))
    ids = jnp.asarray(given["ids"])
    ema = ComplexEMA(x.shape[1], given["alpha"].shape[1], key=jax.random.key(0))
    gamma = given["gamma"]
    new = {
        "alpha": given["alpha"],
        "delta": given["delta"],
        "theta": given["theta"],
        "gamma_real": gamma[..., 0],
        "gamma_imag": gamma[..., 1],
        "omega": given["omega"][:, 0],
    }
    ema = eqx.tree_at(
        lambda m: [getattr(m, k) for k in new],
        ema,
        [jnp.asarray(v) for v in new.values()],
    )

    def slope(ema, x, ids):
        def loss(both):
            return jnp.vdot(both[0](both[1], segment_ids=ids)[0], cotangent)

        return eqx.filter_value_and_grad(loss)((ema, x))

    runs = {}
    for name, segments in (("plain", None), ("packed", ids)):
        made = eqx.filter_jit(slope).lower(ema, x, segments).compile()
        size = made.compiled.memory_analysis().temp_size_in_bytes
        runs[name] = (made, segments, size)
    versions = {k: importlib.metadata.version(k) for k in ("jax", "megalodon-jax")}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        made, segments, size = runs[line.strip()]
        began = time.perf_counter()
        value, (_, dx) = jax.block_until_ready(made(ema, x, segments))
        seconds = time.perf_counter() - began
        sums = [float(value), float(jnp.sum(jnp.abs(dx)))]
        print(json.dumps([seconds, size, *sums]), flush=True)


if __name__ == "__main__":
    main()
