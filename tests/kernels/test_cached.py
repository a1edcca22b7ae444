"""Laws of attention over a cache buffer, against a dense oracle in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mask as M
from pallas_kernels.attention import attention, merge
from pallas_kernels.decode import (
    attention_and_sums,
    cached_attention,
    column_sums,
)


def _case(T=3, N=4, K=2, C=70, B=3, H=16, dtype=jnp.float32, per_head=True, seed=0):
    """Permuted slots, ragged fills (row 1 is empty) and one query of padding."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.normal(size=s), dtype)
        for s in ((B, T, N, H), (B, K, C, H), (B, K, C, H))
    )
    k_pos = np.full((B, K if per_head else 1, C), -1)
    fill = [C, 0, C // 2][:B]
    for b, h in np.ndindex(k_pos.shape[:2]):
        k_pos[b, h, : fill[b]] = rng.permutation(C)[: fill[b]]
    q_pos = np.tile(C - T + np.arange(T), (B, 1))
    q_pos[-1, 0] = -1
    return q, k, v, jnp.asarray(q_pos, jnp.int32), jnp.asarray(k_pos, jnp.int32)


def _oracle(q, k, v, q_pos, k_pos, window=None, scale=None, softcap=None, sink=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q_pos, k_pos = np.asarray(q_pos), np.asarray(k_pos)
    B, T, N, H = q.shape
    out, lse = np.zeros((B, T, N, H)), np.full((B, N, T), -np.inf)
    probabilities = np.zeros((B, N, T, k.shape[2]))
    for b, t, n in np.ndindex(B, T, N):
        h = n // (N // k.shape[1])
        place = k_pos[b, min(h, k_pos.shape[1] - 1)]
        seen = (place >= 0) & (place <= q_pos[b, t])
        if window is not None:
            seen &= q_pos[b, t] - place < window
        s = k[b, h] @ q[b, t, n] * (H**-0.5 if scale is None else scale)
        s = s if softcap is None else softcap * np.tanh(s / softcap)
        w = np.where(seen, np.exp(s), 0.0)
        total = w.sum() + (0.0 if sink is None else np.exp(sink[n]))
        if total > 0:
            probabilities[b, n, t] = w / total
            out[b, t, n] = w @ v[b, h] / total
            lse[b, n, t] = np.log(total)
    return out, lse, probabilities


def _close(got, want, tolerance=2e-5):
    for x, y in zip(got, want, strict=True):
        x = np.asarray(x, np.float64)
        assert np.array_equal(np.isneginf(x), np.isneginf(y))
        np.testing.assert_allclose(
            np.where(np.isneginf(x), 0, x), np.where(np.isneginf(y), 0, y),
            atol=tolerance, rtol=tolerance,
        )  # fmt: skip


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("C", [70, 1500])
def test_any_order_of_slots_equals_the_oracle(T, K, C, per_head):
    case = _case(T=T, K=K, C=C, per_head=per_head)
    _close(cached_attention(*case), _oracle(*case)[:2])


@pytest.mark.parametrize("T", [1, 3])
def test_window_scale_softcap_and_sink_equal_the_oracle(T):
    case = _case(T=T)
    sink = np.linspace(-1, 1, 4)
    options = dict(window=20, scale=0.5, softcap=1.5)
    want = _oracle(*case, sink=sink, **options)[:2]
    _close(cached_attention(*case, sink=jnp.asarray(sink), **options), want)


@pytest.mark.parametrize("T", [1, 3])
def test_bfloat16_cache_stays_near_the_oracle(T):
    case = _case(T=T, dtype=jnp.bfloat16)
    out, lse = cached_attention(*case)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    _close((out, lse), _oracle(*case)[:2], tolerance=2e-2)


@pytest.mark.parametrize("T, N", [(1, 4), (1, 2), (4, 4)])
def test_length_bounds_the_work_and_not_the_result(T, N):
    C, K = 5000, 2
    q, k, v, q_pos, k_pos = _case(T=T, N=N, K=K, C=C, B=1)
    traces = []

    @jax.jit
    def run(k_pos, length):
        traces.append(None)
        return cached_attention(q, k, v, q_pos, k_pos, length=length)

    for used in (0, 1, 1024, 1025, 2400, 4096, C):
        places = k_pos.at[:, :, used:].set(-1)
        want = cached_attention(q, k, v, q_pos, places)
        _close(run(places, jnp.int32(used)), [np.asarray(x) for x in want])
    assert len(traces) == 1


def test_slots_past_length_are_not_read():
    q, k, v, q_pos, k_pos = _case(T=2, C=4096, B=1)
    places = k_pos.at[:, :, 1000:].set(-1)
    poisoned = [x.at[:, :, 1024:].set(jnp.nan) for x in (k, v)]
    out, _ = cached_attention(q, *poisoned, q_pos, places, length=1000)
    _close([out], [np.asarray(cached_attention(q, k, v, q_pos, places)[0])])


def test_chunked_prefill_equals_one_attention():
    B, T, N, K, H, chunk = 1, 96, 4, 2, 16, 32
    keys = jax.random.split(jax.random.key(3), 3)
    q, k, v = (
        jax.random.normal(key, (B, T, heads, H))
        for key, heads in zip(keys, (N, K, K), strict=True)
    )
    mask = M.window(40)
    outs = []
    for start in range(0, T, chunk):
        now = slice(start, start + chunk)
        places = jnp.where(jnp.arange(T) < start, jnp.arange(T), -1)[None, None]
        past = cached_attention(
            q[:, now], k.swapaxes(1, 2), v.swapaxes(1, 2),
            start + jnp.arange(chunk)[None], places, window=40, length=start,
        )  # fmt: skip
        here = attention(q[:, now], k[:, now], v[:, now], mask=mask)
        outs.append(merge(*zip(past, here, strict=True))[0])
    want = attention(q, k, v, mask=mask)[0]
    _close([jnp.concatenate(outs, 1)], [np.asarray(want)])


@pytest.mark.parametrize("C", [70, 1500])
def test_column_sums_equal_the_dense_probabilities(C):
    q, k, v, q_pos, k_pos = _case(T=3, C=C)
    options = dict(window=C // 2, softcap=2.0)
    _, lse, probabilities = _oracle(q, k, v, q_pos, k_pos, **options)
    got = column_sums(q, k, jnp.asarray(lse), q_pos, k_pos, **options)
    _close([got], [probabilities.reshape(3, 2, 2, 3, C).sum((2, 3))])


def test_sums_beside_other_keys_are_those_of_the_merged_softmax():
    q, k, v, q_pos, k_pos = _case(T=2)
    own, past = k_pos.at[..., 40:].set(-1), k_pos.at[..., :40].set(-1)
    _, beside = cached_attention(q, k, v, q_pos, own)
    out, lse, sums = attention_and_sums(q, k, v, q_pos, past, beside)
    _close((out, lse), _oracle(q, k, v, q_pos, past)[:2])
    whole = _oracle(q, k, v, q_pos, k_pos)[2].reshape(3, 2, 2, 2, 70).sum((2, 3))
    _close([sums[..., 40:]], [whole[..., 40:]])
    assert not sums[..., :40].any()


def test_one_query_over_a_bfloat16_cache_makes_no_copy_of_it():
    q, k, v, q_pos, k_pos = _case(T=1, N=2, C=8192, B=1, H=64, dtype=jnp.bfloat16)
    run = jax.jit(functools.partial(cached_attention, window=None))
    memory = run.lower(q, k, v, q_pos, k_pos).compile().memory_analysis()
    assert memory.temp_size_in_bytes < k.nbytes


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(window=0), "window=0"),
        (dict(q_pos=jnp.zeros((3, 2), int)), "q_pos (3, 2)"),
        (dict(k_pos=jnp.zeros((3, 3, 70), int)), "k_pos (3, 3, 70)"),
        (dict(k=jnp.zeros((3, 2, 71, 16))), "must agree"),
        (dict(q=jnp.zeros((3, 3, 3, 16))), "divide"),
        (dict(q=jnp.zeros((3, 4, 16))), "[B, T, N, H]"),
        (dict(sink=jnp.zeros(3)), "sink (3,)"),
    ],
)
def test_bad_calls_name_the_value_and_the_remedy(change, text):
    names = ("q", "k", "v", "q_pos", "k_pos")
    call = dict(zip(names, _case(), strict=True)) | change
    with pytest.raises(ValueError) as error:
        cached_attention(*[call.pop(name) for name in names], **call)
    assert text in str(error.value)
