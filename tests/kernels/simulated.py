"""Laws of the TPU kernels on the CPU: values in interpret mode equal the oracle's.

`make kernels` runs all of them, `make test` those that are fast (`test_attention_tpu`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mask as M
from pallas_kernels.attention import reference, tpu
from pallas_kernels.attention.spec import Spec

MASKS = {
    "causal": M.causal(),
    "full": M.full(),
    "window": M.window(137),
    "sinks": M.causal() & (M.window(150) | M.sink(4)),
    "s2": M.causal() & M.group(64),
    "longgen": M.causal() & M.block_sparse(16, 2, 3, kv_heads=2),
    "packed": M.causal() & M.segments([30, 101, 60]),
    "prefix": M.causal() | M.prefix(170),
    "listed": M.blocks(128, [(0, 0), (1, 0), (2, 1)]),
    "duo": M.per_head([M.causal(), M.window(9), M.causal(), M.window(9)]),
    "straddling": M.per_head([M.causal()] + [M.window(9)] * 3),
}
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def inputs(T, S, *, N=4, K=2, H=16, E=16, B=2, dtype="float32"):
    """q, k, v, sink and cotangents of out and lse, the same for the same sizes."""
    rng = np.random.default_rng(T + S)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, E), (N,), (B, T, N, E), (B, N, T)]
    made = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]
    return [x.astype(dtype) for x in made[:3]], made[3], tuple(made[4:])


def run(attend, spec, qkv, sink, ids, cotangents):
    """Out, lse and the gradients of q, k, v and sink, through both results."""

    def outs(qkv, sink):
        out, lse = attend(spec, *qkv, sink, *ids)
        return out, lse

    @jax.jit
    def both(qkv, sink):
        (out, lse), back = jax.vjp(outs, qkv, sink)
        d_out, d_lse = cotangents
        d_lse = jnp.where(jnp.isfinite(lse), d_lse, 0.0)
        return out, lse, back((d_out.astype(out.dtype), d_lse))

    return both(qkv, sink)


def agree(
    mask, T, S, *, how=True, offset=0, softcap=None, sink=False, ids=None, **size
):
    """Raise AssertionError unless the kernels and the oracle say the same."""
    qkv, learned, cotangents = inputs(T, S, **size)
    learned = learned if sink else None
    spec = Spec(mask, qkv[0].shape[-1] ** -0.5, softcap, offset)
    ids = (None, None) if ids is None else ids
    want = run(reference.attend, spec, qkv, learned, ids, cotangents)
    with tpu.interpreted(how):
        got = run(tpu.attend, spec, qkv, learned, ids, cotangents)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.array_equal(np.isneginf(a), np.isneginf(b))
        a, b = (np.where(np.isneginf(x), 0, x) for x in (a, b))
        assert np.isfinite(a).all()
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3)
        assert error < (2e-5 if qkv[0].dtype == jnp.float32 else 1.5e-2), error


def random_mask(rng) -> M.Mask:
    """A mask of a few parts, some rows of which may see nothing."""
    size = int(rng.integers(1, 9)) * 32
    picks = [
        M.causal(),
        M.window(int(rng.integers(1, 300))),
        M.causal() & (M.window(int(rng.integers(1, 200))) | M.sink(size // 8)),
        M.causal() & M.block_sparse(32, 2, 3, kv_heads=2, offset=int(rng.integers(3))),
        M.causal() & M.group(2 * size),
        M.causal() & M.segments(rng.integers(1, 200, 3).tolist()),
        M.causal() | M.prefix(size),
        M.blocks(size, rng.integers(0, 4, (5, 2)).tolist()),
        M.per_head([M.window(size), M.causal()]),
    ]
    return picks[rng.integers(len(picks))]


def random_cases(count: int, how=True) -> None:
    """Random masks, groups, segments, ragged tails, offsets, caps and sinks."""
    rng = np.random.default_rng(7)
    for _ in range(count):
        T, extra = int(rng.integers(1, 300)), int(rng.integers(0, 200))
        K = int(rng.choice([1, 2]))
        N = int(rng.choice([2, 4, 6]))
        ids = None
        if rng.random() < 0.5:
            ids = jnp.asarray(np.sort(rng.integers(0, 4, (2, T + extra)), 1))
            ids = ids[:, extra:], ids
        agree(
            random_mask(rng), T, T + extra, how=how, offset=extra, N=N, K=K, ids=ids,
            E=int(rng.choice([16, 32])), sink=rng.random() < 0.5,
            softcap=2.0 if rng.random() < 0.3 else None,
        )  # fmt: skip


def every_mask() -> None:
    """Each kind of mask."""
    for mask in MASKS.values():
        agree(mask, 201, 201)


def shapes() -> None:
    """Offsets, one query, rows that see nothing, wide and split groups, bfloat16."""
    sinks = M.causal() & (M.window(140) | M.sink(3))
    agree(sinks, 70, 401, offset=331, sink=True)
    agree(sinks, 1, 330, offset=329)
    agree(M.causal() & M.segments([40]), 296, 296)
    agree(M.causal(), 130, 130, N=24, K=2, B=1)
    agree(sinks, 300, 300, H=64, E=128, dtype="bfloat16", sink=True)


def races() -> None:
    """No kernel reads what it did not write, nor writes what another reads."""
    ids = jnp.asarray(np.arange(300) // 110)[None]
    sinks = M.causal() & (M.window(90) | M.sink(4))
    agree(sinks, 300, 300, how=RACES, B=1, ids=(ids, ids), sink=True, softcap=3.0)
    agree(M.blocks(128, [(0, 0), (2, 1)]), 300, 300, how=RACES, B=1)


CHECKS = {
    "every mask": every_mask,
    "shapes": shapes,
    "random": lambda: random_cases(20),
    "races": races,
}
