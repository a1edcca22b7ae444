"""The complex EMA, forward and backward, beside megalodon-jax and the FFT form.

    python -m benchmarks.cema --peer PYTHON [--repeats 5]

PYTHON is the interpreter of an environment with `megalodon-jax==0.2.2`, which needs an
older jax. One row of T tokens, D channels of 16 orders, float32; packed rows hold three
documents. All forms take turns, so that other load on the machine hits all. Writes
benchmarks/results/cema.json.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compare import cpu_model
from lclm.ops import cema as ops

RESULTS = Path(__file__).parent / "results"
ORDER = 16


def inputs(T: int, D: int) -> dict[str, np.ndarray]:
    """One text, the parameters, the documents of the packed row and a cotangent."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    ids = 1 + (np.arange(T) >= T // 3) + (np.arange(T) >= 3 * T // 4)
    return {
        "x": draw(1, T, D),
        "cotangent": draw(1, T, D),
        "ids": ids[None].astype(np.int32),
        "alpha": 0.2 * draw(D, ORDER, 1),
        "delta": 0.2 * draw(D, ORDER, 1),
        "theta": draw(D, 1, 1),
        "gamma": draw(D, ORDER, 2),
        "omega": 0.25 * draw(D, 1),
    }


def document_positions(ids: np.ndarray) -> np.ndarray:
    """Each token's index in its document."""
    T = ids.shape[1]
    first = np.concatenate([[True], ids[0, 1:] != ids[0, :-1]])
    starts = np.maximum.accumulate(np.where(first, np.arange(T), 0))
    return (np.arange(T) - starts)[None].astype(np.int32)


def ours(given: dict[str, np.ndarray]):
    """name -> (run, bytes of temporaries); a run gives its seconds and two sums."""
    names = ("alpha", "delta", "theta", "gamma", "omega")
    params = tuple(jnp.asarray(given[n]) for n in names)
    x, cotangent = jnp.asarray(given["x"]), jnp.asarray(given["cotangent"])
    state = jnp.zeros((1, 2, ORDER, x.shape[2]))

    def slope_of(form):
        def loss(params, x, cotangent, state, positions):
            y = form(x, ops.coefficients(*params), state, positions)
            return jnp.vdot(y, cotangent)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    def blocks(x, c, state, positions):
        return ops.cema(x, c, state, positions=positions)[0]

    def fft(x, c, state, positions):
        return ops.cema_fft(x, c, state)

    plain = np.arange(x.shape[1], dtype=np.int32)[None]
    packed = document_positions(given["ids"])
    forms = {"plain": (blocks, plain), "packed": (blocks, packed), "fft": (fft, plain)}
    runs, compiled = {}, {}
    for name, (form, positions) in forms.items():
        args = (params, x, cotangent, state, jnp.asarray(positions))
        made = compiled.get(form) or slope_of(form).lower(*args).compile()
        compiled[form] = made

        def run(made=made, args=args) -> list[float]:
            began = time.perf_counter()
            value, (_, dx) = jax.block_until_ready(made(*args))
            seconds = time.perf_counter() - began
            return [seconds, float(value), float(jnp.sum(jnp.abs(dx)))]

        runs[name] = (run, made.memory_analysis().temp_size_in_bytes)
    return runs


class Peer:
    """megalodon-jax in its own process, asked for one run at a time."""

    def __init__(self, python: str, given: dict[str, np.ndarray], folder: str):
        file = Path(folder) / "given.npz"
        np.savez(file, **given)
        script = Path(__file__).parent / "peers" / "megalodon_peer.py"
        self.process = subprocess.Popen(
            [python, str(script), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = json.loads(self.process.stdout.readline())

    def run(self, name: str) -> list[float]:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def measure(args: argparse.Namespace) -> dict:
    """Interleaved runs of every form."""
    given = inputs(args.length, args.width)
    runs = ours(given)
    times: dict[str, list[float]] = {}
    sums: dict[str, list[float]] = {}
    sizes = {f"lclm {name}": size for name, (_, size) in runs.items()}
    versions = {"lclm jax": jax.__version__}
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(args.peer, given, folder) if args.peer else None
        for turn in range(args.repeats + 1):
            for name, (run, _) in runs.items():
                seconds, *sums[f"lclm {name}"] = run()
                if turn:
                    times.setdefault(f"lclm {name}", []).append(seconds)
            for name in ("plain", "packed") if peer else ():
                key = f"megalodon-jax {name}"
                seconds, sizes[key], *sums[key] = peer.run(name)
                if turn:
                    times.setdefault(key, []).append(seconds)
        if peer:
            versions |= peer.versions
            peer.process.stdin.close()
            peer.process.wait()
    best = {name: min(values) for name, values in times.items()}
    return {
        "command": f"python -m benchmarks.cema --repeats {args.repeats}",
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "versions": versions,
        "shape": {"B": 1, "T": args.length, "D": args.width, "orders": ORDER},
        "milliseconds": {
            name: {
                "best": round(1e3 * best[name], 2),
                "median": round(1e3 * statistics.median(values), 2),
            }
            for name, values in times.items()
        },
        "temporaries_over_x": {
            name: round(size / given["x"].nbytes, 1) for name, size in sizes.items()
        },
        "ratios_of_best": ratios(best),
        "sums": sums,
    }


def ratios(best: dict[str, float]) -> dict[str, float]:
    """How many times faster ours is; and what packing costs."""
    pairs = {
        "unpacked over our FFT": ("lclm fft", "lclm plain"),
        "unpacked over megalodon-jax": ("megalodon-jax plain", "lclm plain"),
        "packed over megalodon-jax": ("megalodon-jax packed", "lclm packed"),
        "packing": ("lclm packed", "lclm plain"),
    }
    return {
        name: round(best[a] / best[b], 2) for name, (a, b) in pairs.items() if a in best
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="python with megalodon-jax 0.2.2")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    record = measure(parser.parse_args())
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(record, indent=1)
    (RESULTS / "cema.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
