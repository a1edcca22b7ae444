"""Laws of the TPU kernels that need no TPU: values, visits, choice."""

import logging
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels import mask as M
from pallas_kernels.attention import attention, blocks, tpu
from pallas_kernels.attention.spec import Spec
from tests.kernels import prove, simulated


def _shown(walk, visits, T, S):
    """How often a walk's visits show each pair of whole blocks."""
    down, across = -(-T // walk.block_q), -(-S // walk.block_k)
    shown = np.zeros((down * walk.block_q, across * walk.block_k), int)
    for where, what in zip(visits.where, visits.what, strict=True):
        q, k = (where & 0xFFFF) * walk.block_q, (where >> 16) * walk.block_k
        seen = np.full((walk.block_q, walk.block_k), bool(what & blocks.SEEN))
        if what & blocks.MASKED:
            seen[:] = False
            for edges in walk.patterns[what >> blocks.SHIFT]:
                seen ^= np.arange(walk.block_k) >= edges[:, None]
        shown[q : q + walk.block_q, k : k + walk.block_k] += seen
    return shown


@pytest.mark.parametrize("name", simulated.MASKS)
def test_walks_show_every_visible_pair_once_and_no_other(name):
    T, S, offset = 333, 500, 100
    for mask in simulated.MASKS[name].layout(4):
        for sizes in ((128, 128), (256, 128), (128, 512)):
            walk = blocks.build(mask, T, S, offset, *sizes)
            seen = mask.array(T, S, offset=offset)[0]
            for visits in (walk.by_rows, walk.by_columns):
                shown = _shown(walk, visits, T, S)
                assert np.array_equal(shown[:T, :S], seen)
                assert not shown[:, S:].any()


def test_walks_are_as_long_as_the_mask_is_dense():
    n, mask = 1 << 16, M.causal() & (M.window(1024) | M.sink(4))
    walk = blocks.walk(mask, n, n, 0, 4)
    assert walk.pairs <= 1.6 * mask.pairs(n, n)
    assert len(walk.patterns) <= 8
    n = 1 << 15
    assert blocks.walk(M.causal(), n, n, 0, 4).pairs <= 1.05 * M.causal().pairs(n, n)


def test_walks_take_memory_for_what_they_visit_and_no_map():
    tracemalloc.start()
    walk = blocks.build(M.window(1024), 1 << 17, 1 << 17, 0, 32, 64)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1.5e8  # a map of 4,096 x 2,048 blocks with its counts takes 4e8
    assert len(walk.by_rows.row) < 4096 * 18


def test_walks_number_more_blocks_than_16_bits_hold():
    n, mask = 70_000, M.window(8)
    walk = blocks.build(mask, n, n, 0, 1, 64)
    for visits in (walk.by_rows, walk.by_columns):
        near = np.maximum(visits.row - 7, 0) // 64
        assert visits.row.max() == n - 1 and (visits.row // 64 >= visits.column).all()
        assert (visits.column >= near).all()
    assert (np.diff(walk.by_rows.row) >= 0).all()
    assert (np.diff(walk.by_columns.column) >= 0).all()


def test_queries_are_cut_where_one_walk_is_too_long():
    n, causal = 1 << 18, Spec(M.causal(), 1.0)
    assert isinstance(blocks.walk(causal.mask, n, n, 0, 4), blocks.TooLong)
    runs = tpu._runs(causal, n, n, 4)
    assert [run.stop for run in runs] == [n // 8 * i for i in range(1, 9)]
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    scattered = M.blocks(1, [(i, 2 * j) for i in range(4) for j in range(40)])
    assert "edges" in tpu._runs(Spec(scattered, 1.0), 800, 800, 1)


@pytest.mark.slow
def test_cut_queries_have_the_values_and_gradients_of_the_whole(monkeypatch):
    monkeypatch.setattr(blocks, "MOST_VISITS", 8)
    assert len(tpu._runs(Spec(M.causal(), 0.25), 1100, 1100, 2)) == 2
    ids = jnp.asarray(np.arange(1100) // 700)[None]
    simulated.agree(M.causal(), 1100, 1100, B=1, N=2, K=1, ids=(ids, ids), sink=True)


@pytest.mark.slow  # CPU compilers take half a minute over a grid
def test_values_and_gradients_equal_the_oracle():
    ids = jnp.asarray(np.arange(200) // 90)[None]
    mask = M.per_head([M.causal() & (M.window(90) | M.sink(4)), M.causal()])
    simulated.agree(mask, 200, 200, B=1, ids=(ids, ids), sink=True, softcap=3.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", simulated.CHECKS)
def test_the_laws_of_make_kernels_hold(name):
    simulated.CHECKS[name]()


def _chosen(**changes):
    """The names of kernels in a call traced for a TPU."""
    array = jax.ShapeDtypeStruct
    width, dtype = changes.pop("width", 64), changes.pop("dtype", jnp.bfloat16)
    q, kv = array((1, 256, 4, width), dtype), array((1, 256, 2, width), dtype)
    with dispatch.target("tpu"):
        made = jax.make_jaxpr(
            lambda q, k, v: attention(q, k, v, mask=M.causal(), **changes)
        )(q, kv, kv)
    return "pallas_call" in str(made)


def test_a_tpu_runs_the_kernel_unless_told_otherwise():
    assert _chosen() and not _chosen(implementation="xla")
    with dispatch.preferring("xla"):
        assert not _chosen() and _chosen(implementation="mosaic_tpu")
    wrong = dispatch.preferring("cuda")
    with wrong, pytest.raises(ValueError, match=r"'cuda'.*'mosaic_tpu'"):
        _chosen()


def test_where_a_kernel_refuses_the_next_runs(caplog):
    with caplog.at_level(logging.DEBUG, "pallas_kernels"):
        assert not _chosen(width=24)
    assert "head width 24" in caplog.text
    assert not _chosen(dtype=jnp.float16)


@pytest.mark.parametrize(
    "platform, width, text",
    [("cpu", 64, "this is cpu"), ("tpu", 24, "head width 24 is not a multiple of 16")],
)
def test_a_kernel_asked_for_by_name_says_what_it_takes(platform, width, text):
    q, kv = (jnp.zeros((1, 8, n, width), jnp.bfloat16) for n in (4, 2))
    with dispatch.target(platform), pytest.raises(ValueError, match=text):
        attention(q, kv, kv, mask=M.causal(), implementation="mosaic_tpu")


@pytest.mark.slow  # a process of its own
def test_arrays_that_a_mesh_shares_outside_shard_map_are_refused(on_devices):
    print_chosen = """
import jax, jax.numpy as jnp
from pallas_kernels import dispatch, mask
from pallas_kernels.selective_scan import kernel
from pallas_kernels.attention import attention
x = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
def run(q): return attention(q, q, q, mask=mask.causal())[0]
def scan(q): return q + (kernel((1, 8, 1024), 16, "float32", None) is not None)
P = jax.sharding.PartitionSpec("data")
spread = dict(mesh=mesh, in_specs=P, out_specs=P, check_vma=False)
def inside(f): return jax.shard_map(f, **spread)
for name in ("tpu", "gpu"):
    with dispatch.target(name), jax.sharding.set_mesh(mesh):
        made = [str(jax.make_jaxpr(g)(x)) for f in (run, scan) for g in (f, inside(f))]
    words = "pallas_call", "wgmma", "1.0:bf16"
    print(name, [any(word in text for word in words) for text in made])
"""
    told = on_devices(print_chosen, count=2)
    assert "tpu [False, True, False, True]" in told
    assert "gpu [False, True, False, True]" in told


def test_what_is_over_its_budget_is_named():
    own = {"bundles": 100, "spills": 0, "vmem": 10, "smem": 1}
    assert not prove.breaches({"k": own}, {"k": own})
    (text,) = prove.breaches({"k": own | {"bundles": 103}}, {"k": own})
    assert text == "k: 103 bundles, budget 100"
    (text,) = prove.breaches({"k": own | {"spills": 1}}, {"k": own})
    assert text == "k: 1 spills"
    assert len(prove.breaches({"k": own}, {})) == len(prove.MEASURES["tpu"])
