"""The chunked loss of training beside one that forms all logits, on this CPU.

    python -m benchmarks.loss

Value and both gradients, SmolLM2's shapes (width 576, 49,152 tokens), float32: time of
8,192 tokens, interleaved; temporaries of 32,768 tokens from the compiled program.
"""

import datetime
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compare import cpu_model
from lclm.ops.loss import weighted_nll

WIDTH, VOCAB, CHUNK = 576, 49152, 512
OUT = Path(__file__).parent / "results" / "loss.json"


def chunked(hidden, table, targets, weights):
    """Ours."""
    return weighted_nll(hidden, table, targets, weights, chunk=CHUNK)


def dense(hidden, table, targets, weights):
    """All logits at once."""
    logits = hidden[0] @ table.T
    own = jnp.take_along_axis(logits, targets[0][:, None], 1)[:, 0]
    return jnp.sum((jax.nn.logsumexp(logits, -1) - own) * weights[0])


def arguments(count: int):
    """Hidden states, table, targets and weights of `count` tokens."""
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.standard_normal((1, count, WIDTH)) / 20, jnp.float32),
        jnp.asarray(rng.standard_normal((VOCAB, WIDTH)) / 20, jnp.float32),
        jnp.asarray(rng.integers(0, VOCAB, (1, count))),
        jnp.full((1, count), 1 / count),
    )


def main(rounds: int = 5) -> None:
    """Measure, print, and keep the figures."""
    forms = {"chunked": chunked, "dense": dense}
    compiled = {k: jax.jit(jax.value_and_grad(f, (0, 1))) for k, f in forms.items()}
    given = arguments(8192)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, run in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(run(*given))
            if turn:
                seconds[name].append(time.perf_counter() - began)
    long = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments(32768)]
    memory = compiled["chunked"].lower(*long).compile().memory_analysis()
    logits, table = 4 * 32768 * VOCAB, 4 * VOCAB * WIDTH
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python -m benchmarks.loss",
        "cpu": cpu_model(),
        "jax": jax.__version__,
        "seconds": seconds,
        "time_over_dense": min(seconds["chunked"]) / min(seconds["dense"]),
        "temporaries_beyond_table_gradient": memory.temp_size_in_bytes - table,
        "full_logits": logits,
        "share": (memory.temp_size_in_bytes - table) / logits,
    }
    OUT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
