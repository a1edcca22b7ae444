"""Laws of the GPU kernels that need no GPU: values, gradients, choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels import mask as M
from pallas_kernels.attention import attention, gpu
from pallas_kernels.attention.spec import Spec

SINKS = M.causal() & (M.sink(4) | M.window(40))
# Name -> mask, queries, keys, heads, kv heads, and what else the call has.
CASES = {
    "grouped heads, a ragged tail": (M.causal(), 200, 200, 4, 2, {}),
    "sinks, a window, a capped score": (SINKS, 150, 150, 4, 1, {"softcap": 5.0}),
    "segments": (M.causal(), 140, 140, 2, 2, {"segments": True}),
    "segments, wide heads": (SINKS, 140, 140, 2, 1, {"segments": True, "width": 128}),
    "a mask a head, a learned sink, later queries": (
        M.per_head([SINKS, M.causal()]), 70, 170, 2, 2, {"sink": True, "offset": 100},
    ),
    "rows that see nothing": (M.window(9) & M.prefix(30), 100, 100, 2, 1, {}),
}  # fmt: skip


def inputs(T, S, N, K, options):
    random, H = np.random.default_rng(0), options.pop("width", 64)

    def draw(*shape, dtype=jnp.bfloat16):
        return jnp.asarray(random.standard_normal(shape), dtype)

    arrays = draw(1, T, N, H), draw(1, S, K, H), draw(1, S, K, H)
    sink = draw(N, dtype=jnp.float32) if options.pop("sink", False) else None
    cotangents = draw(1, T, N, H), draw(1, N, T, dtype=jnp.float32)
    if options.pop("segments", False):
        ids = jnp.asarray(np.sort(random.integers(0, 3, (1, T))), jnp.int32)
        options |= {"q_segment_ids": ids, "kv_segment_ids": ids}
    return (*arrays, sink), cotangents, options


def check(got, want, other) -> None:
    """No farther from the oracle than 1.5 times XLA's own form with these operands."""
    got, want, other = (jnp.asarray(x, jnp.float32) for x in (got, want, other))
    assert jnp.linalg.norm(want) > 0
    error, usual = (jnp.linalg.norm(x - want) for x in (got, other))
    assert error <= 1.5 * usual + 1e-6


@pytest.mark.slow  # the simulator takes ten seconds a case
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_oracle(name):
    mask, T, S, N, K, options = CASES[name]
    args, (d_out, d_lse), options = inputs(T, S, N, K, dict(options))

    def run(implementation):
        def attend(q, k, v, sink):
            return attention(
                q, k, v, mask=mask, sink=sink, implementation=implementation, **options
            )

        return attend

    def both(implementation, *args):
        outs, back = jax.vjp(run(implementation), *args)
        return outs, back((d_out.astype(args[0].dtype), d_lse))

    with dispatch.target("gpu"), gpu.interpreted():
        (out, lse), got = both("mosaic_gpu", *args)
    (usual_out, _), usual = both("xla", *args)
    exact = [None if x is None else x.astype(jnp.float32) for x in args]
    (want_out, want_lse), want = both("reference", *exact)
    some = np.isfinite(want_lse)
    np.testing.assert_array_equal(np.isfinite(lse), some)
    np.testing.assert_allclose(lse[some], want_lse[some], atol=2e-5)
    check(out, want_out, usual_out)
    for parts in zip(got[:3], want[:3], usual[:3], strict=True):
        check(*parts)
    if got[3] is not None:  # a sum over rows: what bfloat16 rounded off has both signs
        np.testing.assert_allclose(got[3], want[3], atol=1e-2 * np.abs(want[3]).max())


def _chosen(**changes):
    """Whether a call traced for a GPU has the kernel in it."""
    array = jax.ShapeDtypeStruct
    width, dtype = changes.pop("width", 64), changes.pop("dtype", jnp.bfloat16)
    q, kv = array((1, 256, 4, width), dtype), array((1, 256, 2, width), dtype)
    with dispatch.target("gpu"):
        made = jax.make_jaxpr(
            lambda q, k, v: attention(q, k, v, mask=M.causal(), **changes)
        )(q, kv, kv)
    return "wgmma" in str(made)


def test_a_gpu_runs_the_kernel_unless_told_otherwise():
    assert _chosen() and not _chosen(implementation="xla")


@pytest.mark.parametrize(
    "platform, width, text",
    [
        ("cpu", 64, "this is cpu"),
        ("gpu", 80, r"\(80, 80\) are not both"),
        ("gpu", None, "float32 is not bfloat16"),
    ],
)
def test_a_kernel_asked_for_by_name_says_what_it_takes(platform, width, text):
    dtype, width = (jnp.bfloat16, width) if width else (jnp.float32, 64)
    q, kv = (jnp.zeros((1, 8, n, width), dtype) for n in (4, 2))
    with dispatch.target(platform), pytest.raises(ValueError, match=text):
        attention(q, kv, kv, mask=M.causal(), implementation="mosaic_gpu")


def test_a_walk_beyond_what_a_program_may_hold_is_refused():
    def call(mask, T):
        spec, kind = Spec(mask, 1.0), jnp.dtype("bfloat16")
        q, kv = (1, T, 8, 64), (1, T, 2, 64)
        return dispatch.Call(spec, q, kv, kv, kind, kind, "gpu")

    assert gpu.refuses(call(M.causal(), 1 << 18)) is None
    assert "67108992 visits, above 33554432" in gpu.refuses(call(M.causal(), 1 << 19))
    window = M.causal() & M.window(4096)
    assert gpu.refuses(call(window, 1 << 20)) is None


@pytest.mark.parametrize("turned", [False, True])
def test_every_tile_visits_whole_blocks_first_and_each_block_once(turned):
    mask = M.causal() & (M.sink(4) | M.window(300))
    walk = gpu.blocks.build(mask, 700, 700, 0, 128, 64)
    kinds = mask.summary(700, 700, 128, 64)[0]
    kinds[:, -1] = np.minimum(kinds[:, -1], 1)  # the last keys are padding in part
    visits, kinds = (walk.by_columns, kinds.T) if turned else (walk.by_rows, kinds)
    order = gpu.Order.of(visits, len(kinds), turned)
    for tile, row in enumerate(kinds):
        begin, middle, end = (x[tile] for x in (order.begin, order.middle, order.end))
        assert list(order.other[begin:middle]) == list(np.flatnonzero(row == 2))
        assert list(order.other[middle:end]) == list(np.flatnonzero(row == 1))
