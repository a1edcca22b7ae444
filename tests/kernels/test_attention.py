"""Laws of the attention operation: every implementation equals the dense oracle."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mask as M
from pallas_kernels.attention import attention, merge, plan, xla

MASKS = {
    "causal": M.causal(),
    "full": M.full(),
    "window": M.window(37),
    "sinks": M.causal() & (M.window(50) | M.sink(4)),
    "s2": M.causal() & M.group(64),
    "longgen": M.causal() & M.block_sparse(16, 2, 3, kv_heads=2),
    "packed": M.causal() & M.segments([30, 101, 60]),
    "prefix": M.causal() | M.prefix(70),
    "listed": M.blocks(32, [(0, 0), (1, 0), (3, 2), (3, 5)]),
    "duo": M.per_head([M.causal(), M.window(9), M.causal(), M.window(9)]),
    "straddling": M.per_head([M.causal()] + [M.window(9)] * 3),
}


def _inputs(T, S, N=4, K=2, H=16, E=16, dtype=jnp.float32, B=2):
    keys = jax.random.split(jax.random.key(T + S), 4)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, E), (N,)]
    return [
        jax.random.normal(key, shape).astype(dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def _close(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.array_equal(np.isneginf(x), np.isneginf(y))
        x, y = np.where(np.isneginf(x), 0, x), np.where(np.isneginf(y), 0, y)
        assert np.isfinite(x).all()
        assert np.abs(x - y).max() <= tolerance * max(1.0, np.abs(y).max())


def _both(loss_or_value, *args, **options):
    return [loss_or_value(name, *args, **options) for name in ("xla", "reference")]


def _value_and_grads(name, q, k, v, sink, **options):
    keys = jax.random.split(jax.random.key(1), 2)

    def loss(q, k, v, sink):
        out, lse = attention(q, k, v, sink=sink, implementation=name, **options)
        mix = jax.random.normal(keys[0], out.shape)
        seen = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return (out * mix).sum() + (
            jax.random.normal(keys[1], lse.shape) * seen
        ).sum(), (out, lse)

    wanted = (0, 1, 2, 3) if sink is not None else (0, 1, 2)
    return jax.jit(jax.grad(loss, wanted, has_aux=True))(q, k, v, sink)


def _values(name, q, k, v, sink, **options):
    return attention(q, k, v, sink=sink, implementation=name, **options)


@pytest.mark.parametrize("name", MASKS)
def test_values_equal_the_oracle(name):
    q, k, v, _ = _inputs(201, 201)
    _close(*_both(_values, q, k, v, None, mask=MASKS[name]))


@pytest.mark.parametrize("name", ["sinks", "longgen", "straddling"])
def test_gradients_equal_the_oracle(name):
    q, k, v, _ = _inputs(201, 201)
    _close(*_both(_value_and_grads, q, k, v, None, mask=MASKS[name]))


@pytest.mark.parametrize("T, S, offset", [(70, 201, 131), (1, 130, 129), (150, 90, 3)])
def test_an_offset_places_the_queries_among_the_keys(T, S, offset):
    q, k, v, sink = _inputs(T, S)
    mask = M.causal() & (M.window(40) | M.sink(3))
    _close(*_both(_values, q, k, v, sink, mask=mask, offset=offset))


def test_gradients_with_an_offset_and_ragged_tiles_equal_the_oracle():
    q, k, v, sink = _inputs(70, 201)
    mask = M.causal() & (M.window(40) | M.sink(3))
    _close(*_both(_value_and_grads, q, k, v, sink, mask=mask, offset=131))


def test_softcap_scale_sink_segments_and_value_width_together():
    q, k, v, sink = _inputs(130, 130, E=24)
    ids = jnp.stack([jnp.arange(130) // 50, jnp.arange(130) // 77])
    _close(
        *_both(
            _value_and_grads, q, k, v, sink, mask=M.causal(), scale=0.4, softcap=2.0,
            q_segment_ids=ids, kv_segment_ids=ids,
        )
    )  # fmt: skip


def test_rows_that_see_nothing_give_zero_and_minus_infinity():
    q, k, v, _ = _inputs(96, 96)
    mask = M.causal() & M.segments([40])
    out, lse = attention(q, k, v, mask=mask)
    assert (out[:, 40:] == 0).all() and jnp.isneginf(lse[..., 40:]).all()
    grads, _ = _value_and_grads("xla", q, k, v, None, mask=mask)
    assert all(jnp.isfinite(g).all() for g in grads)
    assert (grads[0][:, 40:] == 0).all() and (grads[1][:, 40:] == 0).all()


@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
def test_bfloat16_is_as_exact_as_dense_bfloat16(operands, monkeypatch):
    monkeypatch.setattr(xla, "compute_dtype", lambda _: jnp.dtype(operands))
    q, k, v, _ = _inputs(256, 256, H=32 if operands == "float32" else 24,
                         dtype=jnp.bfloat16)  # fmt: skip
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    want, _ = attention(*exact, mask=M.causal(), implementation="reference")
    repeat = [jnp.repeat(x, 2, axis=2) for x in (k, v)]
    scores = jnp.einsum("btnh,bsnh->bnts", q * q.shape[-1] ** -0.5, repeat[0])
    scores = jnp.where(jnp.tril(jnp.ones((256, 256), bool)), scores, -jnp.inf)
    dense = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), repeat[1])
    got, lse = attention(q, k, v, mask=M.causal())
    assert lse.dtype == jnp.float32 and got.dtype == jnp.bfloat16
    error = [float(jnp.linalg.norm(x.astype(jnp.float32) - want)) for x in (got, dense)]
    assert error[0] <= 1.5 * error[1]


def test_merged_parts_equal_one_attention_and_its_gradient():
    q, k, v, _ = _inputs(120, 120)
    late = M.blocks(30, [(a, b) for a in range(4) for b in range(a)])

    def parts(q, k, v, masks):
        pairs = [attention(q, k, v, mask=m) for m in masks]
        out, lse = merge(*zip(*pairs, strict=True))
        return jnp.sin(out).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    whole = M.causal()
    split = (M.causal() & M.chunk(30), late)
    grad = jax.jit(jax.grad(parts, (0, 1, 2)), static_argnums=3)
    _close(grad(q, k, v, split), grad(q, k, v, (whole,)))
    out, _ = merge(*zip(*[attention(q, k, v, mask=m) for m in split], strict=True))
    _close(out, attention(q, k, v, mask=whole)[0])


def test_merge_of_empty_parts_is_empty_and_differentiable():
    out, lse = jnp.zeros((1, 3, 2, 4)), jnp.full((1, 2, 3), -jnp.inf)

    def total(out, lse):
        merged, stat = merge([out, out], [lse, lse])
        return merged.sum() + jnp.where(jnp.isfinite(stat), stat, 0.0).sum()

    merged, stat = merge([out, out], [lse, lse])
    assert (merged == 0).all() and jnp.isneginf(stat).all()
    assert all(jnp.isfinite(g).all() for g in jax.grad(total, (0, 1))(out, lse))


@pytest.mark.parametrize("name", MASKS)
def test_plans_visit_every_visible_pair_once(name):
    T, S, offset = 333, 500, 100
    small = 2 * 2 * 64 * 64
    layouts = MASKS[name].layout(4)
    for mask, tile in itertools.product(layouts, (None, small)):
        p = plan.plan(mask, T, S, offset, 2, 2, False, tile)
        widest = max(p.block_q * p.wide, p.sub * p.narrow)
        assert tile is None or 2 * p.batch * widest <= tile
        visits = np.zeros((p.rows * p.block_q, p.keys), int)
        for r in range(p.rows):
            rows = slice(r * p.block_q, (r + 1) * p.block_q)
            for n in range(p.wide_counts[r]):
                start = p.wide_starts[r, n]
                visits[rows, start : start + p.wide] += 1
            for n in range(p.narrow_counts[r]):
                low, high = p.narrow_low[r, n], p.narrow_high[r, n]
                start = p.narrow_starts[r, n]
                assert start <= low and high <= start + p.narrow
                first = r * p.block_q + p.narrow_rows[r, n]
                visits[first : first + p.sub, low:high] += 1
        seen = mask.array(T, S, offset=offset)[0]
        assert (visits <= 1).all()
        assert (visits[:T, :S][seen] == 1).all()


def test_work_and_memory_follow_the_mask():
    n = 16384
    window = plan.plan(M.window(512), n, n, 0, 1, 8)
    assert window.pairs <= 1.6 * M.window(512).pairs(n, n)
    dense = plan.plan(M.causal(), n, n, 0, 1, 8)
    assert dense.pairs <= 1.15 * M.causal().pairs(n, n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporaries_at_8k_stay_under_64_megabytes(dtype):
    shapes = [(1, 8192, 9, 64), (1, 8192, 3, 64), (1, 8192, 3, 64)]
    args = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
    run = jax.jit(lambda q, k, v: attention(q, k, v, mask=M.causal()))
    compiled = run.lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(mask="causal"), "mask='causal'"),
        (dict(implementation="triton"), "'splash', 'tokamax', 'xla'"),
        (dict(sink=jnp.zeros(3)), "sink (3,)"),
        (dict(scale=0.0), "scale=0.0"),
        (dict(softcap=-1.0), "softcap=-1.0"),
        (dict(q_segment_ids=jnp.zeros((2, 8), int)), "only one"),
        (dict(k=jnp.zeros((2, 8, 3, 16))), "must agree"),
        (dict(q=jnp.zeros((2, 8, 3, 16))), "must divide"),
        (dict(q=jnp.zeros((2, 8, 4, 8))), "one head width"),
        (dict(q=jnp.zeros((2, 8, 4, 16), int)), "dtype int32"),
    ],
)
def test_bad_calls_name_the_value_and_the_remedy(change, text):
    q, k, v, _ = _inputs(8, 8)
    call = dict(q=q, k=k, v=v, mask=M.causal()) | change
    with pytest.raises(ValueError) as error:
        attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)
    assert text in str(error.value)


@pytest.mark.parametrize("size", [1.0, 12.0])
def test_bounded_and_running_maximum_forms_agree_with_the_oracle(size, monkeypatch):
    monkeypatch.setattr(xla, "SMALL", 0)
    q, k, v, sink = _inputs(210, 210)
    q, k = size * q, size * k
    largest = jnp.linalg.norm(q, axis=-1).max() * jnp.linalg.norm(k, axis=-1).max() / 4
    assert (largest < xla.BOUNDED) == (size == 1.0)
    options = dict(mask=M.causal() & (M.window(50) | M.sink(4)))
    _close(*_both(_values, q, k, v, sink, **options), 1e-4)


def test_float64_operands_are_computed_in_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.standard_normal((1, 40, n, 8))) for n in (4, 2, 2))
        mask = M.causal() & M.window(17)

        def loss(implementation):
            def total(q, k, v):
                out, lse = attention(
                    q, k, v, mask=mask, softcap=9.0, implementation=implementation
                )
                return (out**2).sum() + jnp.sin(lse).sum()

            return jax.value_and_grad(total, (0, 1, 2))(q, k, v)

        got, want = loss("xla"), loss("reference")
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
