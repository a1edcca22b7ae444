"""What packing documents into one row costs each mixer, forward and backward.

    python -m benchmarks.packing [--length 2048] [--width 256] [--repeats 9]

The same tokens once as one document and once as six, in turn; one layer without a
feed-forward. Writes benchmarks/results/packing.json.
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compare import cpu_model
from lclm.config import AttentionSpec, LayerSpec, ModelConfig, RopeSpec, Run
from lclm.models.decoder import Decoder, init_params
from lclm.specs import FfnSpec, InfiniSpec, Mamba2Spec, MambaSpec, MegalodonSpec

RESULTS = Path(__file__).parent / "results"
ENDS = (0.08, 0.3, 0.42, 0.71, 0.9)  # where documents end, as shares of the row


def mixers(width: int) -> dict[str, object]:
    """A mixer of each kind for rows of `width`."""
    attention = AttentionSpec(width // 64, width // 64, 64, RopeSpec(context=4096))
    return {
        "attention": attention,
        "mamba": MambaSpec(2 * width, width // 16),
        "mamba2": Mamba2Spec(2 * width // 64, 64),
        "megalodon": MegalodonSpec(2, width // 2, 2 * width, chunk=512),
        "infini": InfiniSpec(attention, segment=512),
    }


def slopes(spec: object, width: int):
    """A compiled gradient of one layer: (params, tokens, positions, segments)."""
    layer = LayerSpec(spec, None)
    if isinstance(spec, MegalodonSpec):  # its wiring needs a feed-forward
        layer = LayerSpec(spec, FfnSpec(width), wiring="twohop")
    config = ModelConfig("bench", 256, width, (Run((layer,), 1),), 4096)
    params = init_params(config, jax.random.key(0))

    def loss(params, tokens, positions, segments):
        hidden, _ = Decoder(config).apply(
            {"params": params}, tokens, positions, segments
        )
        return jnp.sum(jnp.sin(hidden))

    return params, jax.jit(jax.grad(loss))


def rows(length: int) -> dict[str, tuple]:
    """Positions and segment ids of one document and of six."""
    index = np.arange(length, dtype=np.int32)
    cuts = np.array([0, *(int(length * end) for end in ENDS)])
    which = np.searchsorted(cuts, index, side="right") - 1
    packed = (index - cuts[which])[None], (which + 1).astype(np.int32)[None]
    return {"one": (index[None], None), "six": packed}


def main() -> None:
    """Run and write the JSON."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--length", type=int, default=2048)
    flags.add_argument("--width", type=int, default=256)
    flags.add_argument("--repeats", type=int, default=9)
    args = flags.parse_args()
    tokens = np.random.default_rng(0).integers(0, 256, (1, args.length))
    found = {}
    for name, spec in mixers(args.width).items():
        params, slope = slopes(spec, args.width)
        layouts = rows(args.length)
        times: dict[str, list[float]] = {layout: [] for layout in layouts}
        for turn in range(args.repeats + 1):
            for layout, where in layouts.items():
                began = time.perf_counter()
                jax.block_until_ready(slope(params, tokens, *where))
                if turn:
                    times[layout].append(1e3 * (time.perf_counter() - began))
        pairs = [b / a for a, b in zip(times["one"], times["six"], strict=True)]
        found[name] = {
            "one_ms": round(min(times["one"]), 2),
            "six_ms": round(min(times["six"]), 2),
            "tax_of_minima": round(min(times["six"]) / min(times["one"]) - 1, 3),
            "tax_median_of_pairs": round(statistics.median(pairs) - 1, 3),
        }
        print(name, found[name], flush=True)
    data = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "jax": jax.__version__,
        "settings": vars(args),
        "mixers": found,
    }
    (RESULTS / "packing.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
