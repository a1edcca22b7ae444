"""Laws of the mask algebra, against a brute-force oracle written pair by pair."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import mask as M

HEADS = 4
SETTINGS = settings(max_examples=150, deadline=None, database=None)
small = st.integers(1, 9)

# An expression is (mask, oracle); oracle(i, j, head) is a plain Python predicate.


def _document(lengths, p):
    end = 0
    for index, length in enumerate(lengths):
        end += length
        if p < end:
            return index
    return None


def _block_sparse(b, local, stride, kv, offset):
    mask = M.block_sparse(b, local, stride, kv_heads=kv, offset=offset)
    step = max(1, stride // kv)

    def oracle(i, j, h):
        qb, kb, kvh = i // b, j // b, h // (HEADS // kv)
        if kb > qb:
            return False
        return qb - kb < local or (kb + kvh * step + offset) % stride == 0

    return mask, oracle


def _segments(lengths):
    def oracle(i, j, h):
        own = _document(lengths, i)
        return own is not None and own == _document(lengths, j)

    return M.segments(lengths), oracle


def _group(g):
    def oracle(i, j, h):
        shift = g // 2 if h >= HEADS // 2 else 0
        return (i + shift) // g == (j + shift) // g

    return M.group(g), oracle


def _blocks(b, pairs):
    return M.blocks(b, pairs), lambda i, j, h: (i // b, j // b) in pairs


leaves = st.one_of(
    st.just((M.full(), lambda i, j, h: True)),
    st.just((M.causal(), lambda i, j, h: j <= i)),
    small.map(lambda w: (M.window(w), lambda i, j, h: 0 <= i - j < w)),
    st.integers(0, 9).map(lambda s: (M.sink(s), lambda i, j, h: j < s)),
    st.integers(0, 9).map(lambda n: (M.prefix(n), lambda i, j, h: j < n)),
    small.map(lambda c: (M.chunk(c), lambda i, j, h: i // c == j // c)),
    small.map(_group),
    st.builds(
        _block_sparse, small, st.integers(1, 3), st.integers(1, 5),
        st.sampled_from([1, 2, 4]), st.integers(0, 4),
    ),
    st.lists(small, min_size=1, max_size=5).map(tuple).map(_segments),
    st.builds(
        _blocks, small, st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    ),
)  # fmt: skip


def _combine(children):
    pair = st.tuples(children, children)

    def per_head(parts):
        run = HEADS // len(parts)
        return (
            M.per_head([m for m, _ in parts]),
            lambda i, j, h: parts[h // run][1](i, j, h),
        )

    def both(p):
        (a, see_a), (b, see_b) = p
        return a & b, lambda i, j, h: see_a(i, j, h) and see_b(i, j, h)

    def either(p):
        (a, see_a), (b, see_b) = p
        return a | b, lambda i, j, h: see_a(i, j, h) or see_b(i, j, h)

    return st.one_of(pair.map(both), pair.map(either), pair.map(per_head))


expressions = st.recursive(leaves, _combine, max_leaves=5)
shapes = st.tuples(st.integers(1, 21), st.integers(1, 21), st.integers(0, 7))


def _dense(oracle, T, S, offset):
    return np.array(
        [
            [[bool(oracle(offset + t, s, h)) for s in range(S)] for t in range(T)]
            for h in range(HEADS)
        ]
    )


@SETTINGS
@given(expressions, shapes)
def test_array_and_pair_count_equal_the_predicate(expression, shape):
    mask, oracle = expression
    T, S, offset = shape
    dense = _dense(oracle, T, S, offset)
    array = mask.array(T, S, heads=HEADS, offset=offset)
    assert array.shape[0] in (1, HEADS)
    assert np.array_equal(np.broadcast_to(array, dense.shape), dense)
    assert mask.pairs(T, S, HEADS, offset) == dense.sum()


@SETTINGS
@given(expressions, shapes, small, small)
def test_summary_is_tight(expression, shape, block_q, block_k):
    mask, oracle = expression
    T, S, offset = shape
    dense = _dense(oracle, T, S, offset)
    kinds = mask.summary(T, S, block_q, block_k, heads=HEADS, offset=offset)
    kinds = np.broadcast_to(kinds, (HEADS, *kinds.shape[1:]))
    for h in range(HEADS):
        for a in range(kinds.shape[1]):
            for b in range(kinds.shape[2]):
                rows = dense[h, a * block_q : (a + 1) * block_q]
                cell = rows[:, b * block_k : (b + 1) * block_k]
                some = M.PARTIAL if cell.any() else M.EMPTY
                assert kinds[h, a, b] == (M.FULL if cell.all() else some)


@SETTINGS
@given(expressions, shapes, small)
def test_kv_bytes_count_each_key_once_per_query_block(expression, shape, block_q):
    mask, oracle = expression
    T, S, offset = shape
    dense = _dense(oracle, T, S, offset).reshape(2, 2, T, S).any(1)
    keys = sum(dense[:, t : t + block_q].any(1).sum() for t in range(0, T, block_q))
    size = mask.kv_bytes(
        T, S, heads=HEADS, kv_heads=2, head_dim=8, itemsize=4, block_q=block_q,
        offset=offset,
    )  # fmt: skip
    assert size == 2 * 4 * 8 * keys
    flops = mask.flops(T, S, heads=HEADS, head_dim=8, offset=offset)
    assert flops == 4 * 8 * _dense(oracle, T, S, offset).sum()


@SETTINGS
@given(expressions, shapes, st.integers(1, 4))
def test_blocks_seen_by_a_query_hold_all_it_sees_and_come_once(expression, shape, cut):
    mask, oracle = expression
    T, S, offset = shape
    dense = _dense(oracle, T, S, offset)
    rows = offset + np.arange(T)
    for h, one in enumerate(mask.layout(HEADS)):
        block = one.grain // (1 if one.grain % cut else cut) or cut
        ask = functools.partial(one.seen_blocks, block=block, S=S)
        seen = ask(rows)
        if seen is None:
            continue
        traced = jax.eval_shape(
            functools.partial(one.seen_blocks, block=block, S=S), rows
        )
        assert traced.shape == seen.shape
        for row, blocks in zip(dense[h], seen, strict=True):
            listed = blocks[blocks >= 0]
            assert len(set(listed)) == len(listed)
            assert set(np.flatnonzero(row) // block) <= set(listed)


def test_a_decoding_step_of_longgen_sees_few_blocks_and_none_in_vain():
    n, mask = 1 << 17, (M.causal() & M.block_sparse(64, 16, 128)).at_head(0, 1)
    for i in (0, 5000, n - 1):
        blocks = mask.seen_blocks(np.array([i]), 64, n)[0]
        assert blocks.shape == (16 + n // 64 // 128,)
        row = mask.array(1, n, offset=i)[0, 0]
        assert set(blocks[blocks >= 0]) == set(np.flatnonzero(row) // 64)


@SETTINGS
@given(expressions)
def test_masks_are_hashable_values(expression):
    mask, _ = expression
    assert {mask: 1}[mask] == 1
    assert mask & M.causal() == mask & M.causal()
    assert (mask & M.causal()) != (mask | M.causal())


def test_the_longest_shapes_need_no_dense_array():
    n = 1 << 20
    mask = M.causal() & (M.window(1020) | M.sink(4))
    assert mask.pairs(n, n) == sum(min(i + 1, 1024) for i in range(n))
    kinds = mask.summary(n, n, 4096, 4096)
    assert (kinds[0, 5:].astype(bool).sum(-1) == 3).all()


def test_longgen_cache_share_is_a_sixty_fourth():
    n, kv = 1 << 17, 8
    mask = M.causal() & M.block_sparse(64, 16, 128, kv_heads=kv)
    size = dict(heads=32, kv_heads=kv, head_dim=128, offset=n - 1)
    share = mask.kv_bytes(1, n, **size) / M.causal().kv_bytes(1, n, **size)
    assert 1 / 70 < share < 1 / 60


def test_heterogeneous_stripes_cover_every_block():
    masks = (M.causal() & M.block_sparse(4, 1, 4, kv_heads=4)).array(64, 64, heads=4)
    assert np.array_equal(masks.any(0), M.causal().array(64, 64)[0])


@pytest.mark.parametrize(
    "build, value",
    [
        (lambda: M.window(0), "window=0"),
        (lambda: M.window(2.5), "window=2.5"),
        (lambda: M.window(True), "window=True"),
        (lambda: M.sink(-1), "sink=-1"),
        (lambda: M.prefix(-3), "prefix=-3"),
        (lambda: M.chunk(0), "chunk=0"),
        (lambda: M.group(0), "group=0"),
        (lambda: M.group(4, shift=-1), "shift=-1"),
        (lambda: M.block_sparse(0, 1, 1), "block=0"),
        (lambda: M.block_sparse(1, 0, 1), "local=0"),
        (lambda: M.block_sparse(1, 1, 0), "stride=0"),
        (lambda: M.segments([]), "lengths=()"),
        (lambda: M.segments([3, 0]), "document length=0"),
        (lambda: M.blocks(4, [(0, -1)]), "key block=-1"),
        (lambda: M.per_head([]), "masks=()"),
        (lambda: M.per_head([M.full()] * 3).layout(4), "3 masks"),
        (lambda: M.group(4).array(4, 4), "heads=None"),
        (lambda: M.group(4).layout(1), "heads=1"),
        (lambda: M.block_sparse(1, 1, 1, kv_heads=3).layout(4), "kv_heads=3"),
        (lambda: M.causal().array(0, 4), "T=0"),
        (lambda: M.causal().pairs(4, 4, offset=-1), "offset=-1"),
        (lambda: M.causal().summary(4, 4, 0, 4), "block_q=0"),
        (lambda: M.block_sparse(6, 1, 2).seen_blocks(np.arange(3), 4, 9), "block=4"),
    ],
)
def test_bad_arguments_name_value_limit_and_remedy(build, value):
    with pytest.raises(ValueError) as error:
        build()
    text = str(error.value)
    assert value in text
    assert len(text) > len(value) + 20
