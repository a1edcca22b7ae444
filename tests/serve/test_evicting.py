"""Evicting policies against references written out in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.cache import make
from lclm.cache.base import Heads, Layer, layers_of
from lclm.cache.expected import ExpectedAttention
from lclm.cache.heads import classes
from lclm.cache.scores import H2O, TOVA, KeyDiff, Knorm, PyramidKV, SnapKV
from lclm.cache.step import make_step
from lclm.config import AttentionSpec, RopeSpec
from lclm.errors import LclmError
from lclm.ops.rope import angles, rotate
from tests.tiny import tiny_config, tiny_lm, tokens

SPEC = AttentionSpec(4, 2, 8, RopeSpec(context=64))
LENGTH = 30


@functools.cache
def heads() -> Heads:
    keys = jax.random.split(jax.random.key(3), 3)
    return Heads(
        *(
            2 * jax.random.normal(k, (1, LENGTH, n, SPEC.head_dim))
            for k, n in zip(keys, (4, 2, 2), strict=True)
        )
    )


@functools.cache
def scores() -> np.ndarray:
    """Scaled logits [N, T, S] with every token at its own position."""
    at = jnp.arange(LENGTH)[None]
    q, k = (rotate(x, *angles(at, SPEC.rope, 8)) for x in (heads().q, heads().k))
    return np.einsum("bthd,bshd->hts", q, np.repeat(k, 2, 2)) * 8**-0.5


def weights(row: int, seen: dict[int, list[int]]) -> np.ndarray:
    """Probabilities [N, S] of query `row` over the tokens `seen` by each kv head."""
    out = np.zeros((4, LENGTH))
    for n in range(4):
        here = seen[n // 2]
        logits = scores()[n, row, here]
        logits = np.exp(logits - logits.max())
        out[n, here] = logits / logits.sum()
    return out


def everything(row: int) -> dict[int, list[int]]:
    return {k: list(range(row + 1)) for k in (0, 1)}


@functools.partial(jax.jit, static_argnames="policy")
def _call(policy, cache, part, at):
    T = part.q.shape[1]
    positions = at + jnp.arange(T, dtype=jnp.int32)[None]
    step = make_step(tiny_config(), positions, start=at[None])
    return policy.attend(cache, part, step, Layer(0, SPEC))


def read(policy, chunk: int):
    """(outputs [T, N, H], cache) behind all tokens, `chunk` at a time."""
    cache, outs = policy.init(Layer(0, SPEC), 1, LENGTH, jnp.float32), []
    for at in range(0, LENGTH, chunk):
        part = jax.tree.map(lambda x, at=at: x[:, at : at + chunk], heads())
        out, cache = _call(policy, cache, part, jnp.int32(at))
        outs.append(out[0])
    return np.concatenate(outs), cache


def held(cache) -> dict[int, set[int]]:
    return {
        k: {p for p in np.asarray(cache.groups[0].pos[0, k]).tolist() if p >= 0}
        for k in (0, 1)
    }


def top(score: np.ndarray, among: list[int], count: int) -> set[int]:
    order = sorted(among, key=lambda t: (-score[t], t))
    return set(order[: max(count, 0)])


def by_group(probabilities: np.ndarray) -> np.ndarray:
    return probabilities.reshape(2, 2, LENGTH).sum(1)


def streamed(policy, rate) -> tuple[np.ndarray, dict[int, set[int]]]:
    """Token by token: attend to what is kept and oneself, then drop the lowest."""
    kept = {0: [], 1: []}
    total = np.zeros((2, LENGTH))
    v, outs = np.asarray(heads().v[0]), []
    for t in range(LENGTH):
        kept = {k: [*kept[k], t] for k in kept}
        p = weights(t, kept)
        outs.append(np.einsum("ns,nsd->nd", p, np.repeat(v, 2, 1).transpose(1, 0, 2)))
        total = rate(total, by_group(p))
        for k, seen in kept.items():
            if len(seen) > policy.budget:
                recent = t - policy.protected_recent
                free = [s for s in seen if policy.sinks <= s <= recent]
                seen.remove(min(free, key=lambda s: (total[k, s], s)))
    return np.stack(outs), {k: set(seen) for k, seen in kept.items()}


def test_h2o_adds_up_every_query_and_never_takes_a_token_back():
    policy = H2O(budget=8)
    outs, kept = streamed(policy, lambda total, mass: total + mass)
    got, cache = read(policy, chunk=1)
    np.testing.assert_allclose(got, outs, atol=1e-5)
    assert held(cache) == kept


def test_tova_drops_what_the_last_query_looks_at_least_in_all_heads():
    policy = TOVA(budget=8)

    def last(total, mass):
        return np.broadcast_to(mass.mean(0), mass.shape)

    outs, kept = streamed(policy, last)
    got, cache = read(policy, chunk=1)
    np.testing.assert_allclose(got, outs, atol=1e-5)
    assert held(cache) == kept


def test_h2o_behind_a_prompt_has_the_column_sums_of_dense_attention():
    policy = H2O(budget=10, recent=4, at="end")
    sums = sum(by_group(weights(t, everything(t))) for t in range(LENGTH))
    _, cache = read(policy, 7)
    np.testing.assert_allclose(cache.extra["score"][0], sums, rtol=1e-4, atol=1e-5)
    cut = held(policy.settle(cache, Layer(0, SPEC), LENGTH))
    for k in (0, 1):
        heavy = top(sums[k], range(LENGTH - 4), 6)
        assert cut[k] == heavy | set(range(LENGTH - 4, LENGTH))


@pytest.mark.parametrize(("chunk", "pool"), [(7, "avg"), (LENGTH, "max")])
def test_snapkv_pools_what_the_last_queries_look_at_whatever_the_chunk(chunk, pool):
    policy = SnapKV(budget=12, recent=5, kernel=3, pool=pool, at="end")
    asked = range(LENGTH - 5, LENGTH)
    mass = sum(by_group(weights(t, everything(t))) for t in asked)
    mass[:, LENGTH - 5 :] = 0
    side = -np.inf if pool == "max" else 0.0
    padded = np.pad(mass, ((0, 0), (1, 1)), constant_values=side)
    three = np.stack([padded[:, i : i + LENGTH] for i in range(3)])
    pooled = three.max(0) if pool == "max" else three.mean(0)
    _, cache = read(policy, chunk)
    cut = held(policy.settle(cache, Layer(0, SPEC), LENGTH))
    for k in (0, 1):
        assert cut[k] == top(pooled[k], range(LENGTH - 5), 7) | set(asked)


def test_knorm_and_keydiff_rate_keys_alone():
    turned = np.asarray(rotate(heads().k, *angles(jnp.arange(30)[None], SPEC.rope, 8)))
    size = np.linalg.norm(turned[0], axis=-1, keepdims=True)
    mean = (turned[0] / size).mean(0)
    mean = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    alike = np.einsum("tkd,kd->kt", turned[0] / size, mean)
    for cls, wanted in ((Knorm, -size[..., 0].T), (KeyDiff, -alike)):
        policy = cls(budget=9, sinks=2, recent=3, at="end")
        _, cache = read(policy, LENGTH)
        cut = held(policy.settle(cache, Layer(0, SPEC), LENGTH))
        for k, kept in cut.items():
            assert kept == top(wanted[k], range(2, 27), 4) | {0, 1, 27, 28, 29}


def test_expected_attention_is_that_of_normal_queries_at_the_positions_ahead():
    policy = ExpectedAttention(budget=9, sinks=2, recent=3, ahead=6, at="end")
    _, cache = read(policy, LENGTH)
    (kv,), notes = cache.groups, dict(cache.extra)
    score, _ = policy.rate(kv, notes.pop("score"), notes, Layer(0, SPEC))
    q, v = np.asarray(heads().q[0, 2:]), np.asarray(heads().v[0])
    wanted = np.zeros((2, 2, LENGTH))
    turns = [angles(jnp.full((1, 8), p), SPEC.rope, 8) for p in range(30, 36)]
    basis = jnp.eye(8)[None, :, None]
    R = np.mean([rotate(basis, *t)[0, :, 0] for t in turns], 0)  # rows: turned basis
    for n in range(4):
        mean, cov = q[:, n].mean(0), np.cov(q[:, n].T, bias=True)
        k = np.asarray(kv.k[0, n // 2]) * 8**-0.5
        square = np.einsum("si,ij,sj->s", k, R.T @ cov @ R, k)
        wanted[n // 2, n % 2] = np.exp(k @ (mean @ R) + square / 2)
    wanted = (wanted / wanted.sum(-1, keepdims=True)).mean(1)
    wanted *= np.linalg.norm(v, axis=-1).T
    np.testing.assert_allclose(score[0], wanted, rtol=1e-3)


def test_heads_that_want_more_get_more_and_the_sum_stays():
    assert classes(8, 100, 0.5) == ((2, 150), (4, 100), (2, 50))
    assert classes(1, 100, 0.5) == classes(1, 100, 0.0) == ((1, 100),)
    policy = H2O(budget=10, recent=2, at="end", ada=0.5)
    _, cache = read(policy, LENGTH)
    layer = Layer(0, SPEC)
    cut = policy.settle(cache, layer, LENGTH)
    sums = sum(by_group(weights(t, everything(t))) for t in range(LENGTH))
    ranked = np.where(np.arange(LENGTH) >= 28, 1e9, sums)
    least = np.sort(ranked.ravel())[-20]
    order = np.argsort(-(ranked >= least).sum(1), kind="stable")
    np.testing.assert_array_equal(cut.extra["order"][0], order)
    assert [kv.k.shape[:3] for kv in cut.groups] == [(1, 1, 15), (1, 1, 5)]
    for kv, head in zip(cut.groups, order, strict=True):
        size = kv.k.shape[2]
        wanted = top(sums[head], range(28), size - 2) | {28, 29}
        assert set(np.asarray(kv.pos[0, 0]).tolist()) == wanted


@pytest.mark.slow
def test_a_head_of_its_own_size_reads_its_own_tokens():
    equal = H2O(budget=LENGTH, recent=2, at="end")
    varied = dataclasses.replace(equal, budget=24, ada=0.5)
    part = jax.tree.map(lambda x: x[:, -1:], heads())
    outs = {}
    for policy in (equal, varied):
        _, cache = read(policy, LENGTH)
        cut = policy.settle(cache, Layer(0, SPEC), LENGTH)
        after = policy.settled(LENGTH)
        room = jax.eval_shape(
            lambda a=after: a.init(Layer(0, SPEC), 1, LENGTH + 1, jnp.float32)
        )
        cut = jax.tree.map(
            lambda x, y: jnp.pad(
                x,
                [(0, n - o) for o, n in zip(x.shape, y.shape, strict=True)],
                constant_values=-1 if x.dtype == jnp.int32 else 0,
            ),
            cut,
            room,
        )
        outs[policy.ada], _ = _call(after, cut, part, jnp.int32(LENGTH))
        order = cut.extra["order"][0]
    big, small = (slice(2 * int(k), 2 * int(k) + 2) for k in order)
    np.testing.assert_allclose(
        outs[0.5][:, :, big], outs[0.0][:, :, big], rtol=1e-5, atol=1e-5
    )
    assert np.abs(outs[0.5][:, :, small] - outs[0.0][:, :, small]).max() > 1e-4


def test_pyramidkv_falls_with_depth_and_spends_the_same_tokens():
    policy = PyramidKV(budget=128, recent=8)
    layers = [Layer(i, SPEC, rank=i, layers=12) for i in range(12)]
    shares = [policy.share(layer, 4096) for layer in layers]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 8 + 240 - 6
    assert shares[-1] == 8 + 6
    assert {policy.share(layer, 200) for layer in layers} == {128}
    assert [layer.rank for layer in layers_of(tiny_config())] == [0, 1]
    for depth, budget, length in np.ndindex(13, 60, 3):
        policy = PyramidKV(budget=40 + budget)
        layers = [Layer(i, SPEC, rank=i, layers=depth) for i in range(depth)]
        shares = [policy.share(layer, 90 + 40 * length) for layer in layers]
        assert sum(shares) == depth * policy.budget
    with pytest.raises(LclmError, match="budget 10 is below the 32 tokens"):
        PyramidKV(budget=10, recent=32)
    with pytest.raises(LclmError, match="budget 20 is below the 32 tokens"):
        PyramidKV(budget=200, recent=32, beta=20, at="end", ada=0.5)


@pytest.mark.slow
def test_a_cut_prompt_goes_on_evicting_where_asked():
    lm, row = tiny_lm(), tokens(1, 30)[0].tolist()
    context = lm.prefill(row, cache="h2o:budget=8,at=end,decode=evict", chunk=30)
    session = context.session
    before = session.caches[0].groups[0].k.shape
    assert before[2] == 8
    session.read([[3, 4, 5]])
    assert session.caches[0].groups[0].k.shape == before
    assert np.asarray(session.caches[0].groups[0].pos).max() == 32


@pytest.mark.slow
def test_a_text_behind_a_context_loses_what_it_loses_behind_it():
    lm, text = tiny_lm(), tokens(1, 30)
    context = lm.prefill(text[0, :20].tolist(), cache="h2o:budget=40,at=end", chunk=20)
    got = context.nll(text[0, 20:])
    np.testing.assert_allclose(got, lm.nll(text)[:, 20:], atol=3e-5)
    np.testing.assert_array_equal(context.nll(text[0, 20:]), got)


@pytest.mark.slow
def test_a_cut_context_is_saved_and_loaded(tmp_path):
    lm, row = tiny_lm(), tokens(1, 30)[0].tolist()
    context = lm.prefill(row, cache="snapkv:budget=8,at=end", chunk=16)
    context.save(tmp_path / "context.safetensors")
    again = lm.load_context(tmp_path / "context.safetensors")
    assert again.generate([3, 4], 5).tokens == context.generate([3, 4], 5).tokens


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("h2o:budget=0", "at least 1"),
        ("h2o:budget=8,recent=9", "below the 9 tokens it protects"),
        ("knorm:budget=8,recent=6", "sinks 4, recent 6"),
        ("tova:at=begin", "use 'chunk' or 'end'"),
        ("snapkv:kernel=4", "odd"),
        ("snapkv:pool=sum", "'avg' or 'max'"),
        ("h2o:ada=0.5", "needs at='end'"),
        ("h2o:at=end,ada=1.5", "use 0"),
        ("h2o:budget=8,recent=5,at=end,ada=0.5", "budget 4 is below the 5"),
        ("h2o:at=end,decode=drop", "'keep' or 'evict'"),
    ],
)
def test_options_that_cannot_work_are_refused(policy, words):
    with pytest.raises(LclmError, match=words):
        make(policy)


def test_a_loss_under_a_cut_prompt_and_turning_angles_are_refused():
    lm = tiny_lm()
    with pytest.raises(LclmError, match="at=chunk"):
        lm.nll(tokens(1, 20), cache="h2o:at=end")
    moving = dataclasses.replace(SPEC.rope, kind="dynamic", factor=2.0)
    spec = dataclasses.replace(SPEC, rope=moving)
    with pytest.raises(LclmError, match="fixed type"):
        H2O().init(Layer(0, spec), 1, 32, jnp.float32)
