"""Laws of S2-Attn in training (LongLoRA, arXiv 2309.12307), and of packed patterns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.attention import make
from lclm.blocks.attention import dense_attention, layer_mask
from lclm.cache.base import Heads
from lclm.cache.step import make_step
from lclm.config import AttentionSpec
from lclm.data.batch import make_batch
from lclm.errors import LclmError
from lclm.models.decoder import Decoder, init_params
from lclm.train.config import ModelSpec
from lclm.train.state import reshaped, training_config
from tests.tiny import lively, tiny_config, tokens

B, T, H = 2, 48, 8
SEGMENTS = np.ones((B, T), np.int32)
SEGMENTS[0, 13:] = 2
SEGMENTS[1, 30:] = 2
SEGMENTS[1, 44:] = 0


def heads(query: int, kv: int) -> tuple:
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = ((B, T, query, H), (B, T, kv, H), (B, T, kv, H))
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


def step_of(config, segments=None):
    shape = (B, T) if segments is None else segments.shape
    at = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    if segments is not None:
        rows = np.concatenate([segments, segments[:, -1:]], 1)
        at = make_batch(np.zeros_like(rows), rows)["positions"]
    ids = None if segments is None else jnp.asarray(segments)
    return make_step(config, jnp.asarray(at), segments=ids)


def attend(spec: AttentionSpec, segments=None):
    """Output and gradients of a weighted sum, for `heads` without rotation."""
    spec = dataclasses.replace(spec, rope=None)
    step = step_of(tiny_config(), segments)
    own = heads(spec.heads, spec.kv_heads)
    weight = jax.random.normal(jax.random.key(5), own[0].shape)
    if segments is not None:
        weight = weight * (segments > 0)[:, :, None, None]

    def loss(parts):
        out = dense_attention(Heads(*parts), step, spec, None)
        return jnp.sum(out * weight), out

    slope, out = jax.jit(jax.grad(loss, has_aux=True))(own)
    return np.asarray(out), [np.asarray(g) for g in slope]


def reference(spec: AttentionSpec, segments, seen):
    """Attention written out, over bool `seen` [N, T, T] and documents."""
    own = heads(spec.heads, spec.kv_heads)
    weight = jax.random.normal(jax.random.key(5), own[0].shape)
    weight = weight * (segments > 0)[:, :, None, None]
    group = spec.heads // spec.kv_heads
    same = segments[:, :, None] == segments[:, None, :]
    shown = jnp.asarray(seen)[None] & same[:, None]

    def loss(parts):
        q, k, v = parts
        k, v = (jnp.repeat(x, group, 2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * H**-0.5
        p = jax.nn.softmax(jnp.where(shown, scores, -1e30), -1)
        out = jnp.einsum("bnts,bsnh->btnh", p, v, precision="highest")
        return jnp.sum(out * weight), out

    slope, out = jax.grad(loss, has_aux=True)(own)
    return np.asarray(out), [np.asarray(g) for g in slope]


def halves(count: int, group: int) -> np.ndarray:
    """Causal attention in segments p // G and (p + G/2) // G, by head half."""
    p = np.arange(T)
    ids = np.stack([p // group] * (count // 2), 0)
    moved = np.stack([(p + group // 2) // group] * (count - count // 2), 0)
    ids = np.concatenate([ids, moved])
    return (ids[:, :, None] == ids[:, None, :]) & (p[:, None] >= p)


@pytest.mark.parametrize(
    ("query", "kv"), [(4, 2), (9, 3), pytest.param(4, 4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("group", [8, pytest.param(24, marks=pytest.mark.slow)])
def test_it_is_attention_in_segments_of_each_head_half_and_document(query, kv, group):
    pattern = f"shifted_groups:group={group}"
    spec = AttentionSpec(query, kv, H, pattern=pattern, laid="rows")
    got, slopes = attend(spec, SEGMENTS)
    want, right = reference(spec, SEGMENTS, halves(query, group))
    real = SEGMENTS > 0
    np.testing.assert_allclose(got[real], want[real], atol=2e-6)
    for a, b in zip(slopes, right, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_wrapping_is_the_papers_roll_group_attend_roll_back():
    group = 8
    pattern = f"shifted_groups:group={group},wrap=1,length={T}"
    got, _ = attend(AttentionSpec(4, 4, H, pattern=pattern, laid="rows"))
    q, k, v = heads(4, 4)

    def grouped(x):
        return x.reshape(B * T // group, group, 2, H)

    def inside(q, k, v):
        q, k, v = map(grouped, (q, k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
        hidden = np.triu(np.ones((group, group), bool), 1)
        p = jax.nn.softmax(jnp.where(hidden, -1e30, scores), -1)
        return jnp.einsum("bnts,bsnh->btnh", p, v).reshape(B, T, 2, H)

    moved = [jnp.roll(x[:, :, 2:], -group // 2, 1) for x in (q, k, v)]
    shifted = jnp.roll(inside(*moved), group // 2, 1)
    plain = inside(*(x[:, :, :2] for x in (q, k, v)))
    np.testing.assert_allclose(got, np.concatenate([plain, shifted], 2), atol=2e-6)


def test_wrapping_groups_count_what_they_show():
    mask = make(f"shifted_groups:group=8,wrap=1,length={T}")
    seen = np.asarray(mask.array(T, T, heads=4))
    assert mask.pairs(T, T, 4) == seen.sum()
    blocks = mask.summary(T, T, 4, 4, heads=4) > 0
    np.testing.assert_array_equal(
        blocks, seen.reshape(4, T // 4, 4, T // 4, 4).any((2, 4))
    )


def leak(pattern: str, layers: int = 1) -> np.ndarray:
    """[T, T]: size of d out[t] / d input[u] of a stack of layers."""
    config = tiny_config(windows=(None,) * layers)
    config = training_config(config, ModelSpec("x", pattern=pattern), T)
    params = lively(init_params(config, jax.random.key(0)))

    def out(table):
        new = params | {"embed": {"table": table}}
        hidden, _ = Decoder(config).apply({"params": new}, jnp.arange(T)[None])
        return hidden[0]

    weights = jax.random.normal(jax.random.key(3), (32,))
    slope = jax.jit(jax.jacrev(lambda table: out(table) @ weights))
    return np.abs(slope(params["embed"]["table"])).sum(-1)[:, :T]


@pytest.mark.slow
def test_nothing_looks_ahead_but_where_groups_wrap():
    assert np.triu(leak("shifted_groups:ratio=0.25"), 1).max() == 0
    wrapped = np.triu(leak("shifted_groups:group=12,wrap=1"), 1)
    assert wrapped[:6, -6:].min() > 0
    assert wrapped[6:].max() == 0


@pytest.mark.slow
def test_two_layers_carry_information_across_groups():
    group = 12
    one, two = leak("shifted_groups:group=12"), leak("shifted_groups:group=12", 2)
    assert one[group + 1, group - 1] > 0  # by the shifted heads
    assert one[group + 1, 0] == 0 and two[group + 1, 0] > 0


def test_one_group_is_full_attention():
    config = tiny_config()
    spec = ModelSpec("x", pattern=f"shifted_groups:group={T}")
    params = lively(init_params(config, jax.random.key(0)))
    text = jnp.asarray(tokens(2, T))
    whole, _ = Decoder(config).apply({"params": params}, text)
    got, _ = Decoder(training_config(config, spec, T)).apply({"params": params}, text)
    np.testing.assert_array_equal(got, whole)


def test_the_pattern_is_of_training_alone():
    spec = ModelSpec("x", pattern="shifted_groups:ratio=0.25")
    assert reshaped(tiny_config(), spec) == tiny_config()
    trained = training_config(tiny_config(), spec, T).layers[0].mixer
    assert trained.laid == "rows" and f"length={T}" in trained.pattern


def test_layers_with_a_window_keep_it():
    spec = ModelSpec("x", pattern="shifted_groups:ratio=0.25")
    first, second = training_config(tiny_config(windows=(8, None)), spec, T).layers
    assert first.mixer.window == 8 and first.mixer.pattern is None
    assert second.mixer.pattern is not None


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("shifted_groups:group=20", "divides the length"),
        ("shifted_groups:group=3", "even number"),
        ("shifted_groups:ratio=0.3", "groups of 14"),
        ("shifted_groups:groups=4", "did you mean 'group'"),
    ],
)
def test_groups_that_do_not_fit_are_refused(pattern, words):
    with pytest.raises(LclmError, match=words):
        training_config(tiny_config(), ModelSpec("x", pattern=pattern), T)


def test_what_is_not_there_is_refused():
    with pytest.raises(LclmError, match="no layer of full attention"):
        spec = ModelSpec("x", pattern="shifted_groups:ratio=0.25")
        training_config(tiny_config(windows=(8, 8)), spec, T)
    with pytest.raises(LclmError, match="unknown model"):
        ModelSpec("x", laid="row")
    with pytest.raises(LclmError, match="length of rows"):
        attend(AttentionSpec(4, 2, H, pattern="shifted_groups:ratio=0.25"))


@pytest.mark.parametrize(
    "sparse",
    [
        dict(sinks=3, window=6),
        dict(pattern="block_sparse:block=8,local=2,stride=3,kv_heads=2"),
    ],
)
def test_rows_of_one_document_run_in_blocks_with_the_same_result(sparse):
    spec = AttentionSpec(4, 2, H, **sparse)
    whole = np.ones((B, T), np.int32)
    whole[1, 40:] = 0
    got, slopes = attend(spec, whole)
    want, right = pair_by_pair(spec, whole)
    real = whole > 0
    np.testing.assert_allclose(got[real], want[real], atol=2e-6)
    for a, b in zip(slopes, right, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def pair_by_pair(spec, segments):
    mask = layer_mask(spec).array(T, T, heads=spec.heads)
    seen = np.broadcast_to(np.asarray(mask), (spec.heads, T, T))
    return reference(spec, segments, seen)
