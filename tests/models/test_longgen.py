"""LongGen: sparse layers around full ones, the same dense and through a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import cache as policies
from lclm.attention import patterns
from lclm.blocks.attention import layer_mask
from lclm.blocks.layer import init_states
from lclm.cache.base import measured_bytes
from lclm.config import AttentionSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec
from lclm.config import find_runs as runs
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.models.decoder import Decoder, init_params
from lclm.models.hybrid_presets import infini, infini_params, longgen
from lclm.models.presets import preset
from lclm.ops import masked
from lclm.ops.masked import masked_attention, step_attention
from pallas_kernels.attention.reference import attend
from pallas_kernels.attention.spec import Spec
from tests.tiny import dense_nll, lively, tiny_config, tokens

LENGTH = 40
SINK = {"window": 6, "sinks": 3}
BLOCK = {"pattern": "block_sparse:block=4,local=2,stride=3,kv_heads=2"}


def config(*changes: dict) -> ModelConfig:
    """One layer for each change to full attention."""
    base = AttentionSpec(4, 2, 8, RopeSpec(context=64))
    layers = tuple(
        LayerSpec(dataclasses.replace(base, **change), MlpSpec(48))
        for change in changes
    )
    return ModelConfig("longgen", 97, 32, runs(layers), 64)


@functools.cache
def model(*kinds: str) -> LanguageModel:
    made = config(*({"sink": SINK, "block": BLOCK, "full": {}}[k] for k in kinds))
    return LanguageModel(made, lively(init_params(made, jax.random.key(0))))


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("sink", "full"), ("block", "full")])
def test_a_cache_gives_the_losses_of_the_dense_pass_at_any_chunk(kinds):
    lm, text = model(*kinds), tokens(2, LENGTH)
    want = dense_nll(lm, text)
    for chunk in (1, 16):
        nll = lm.nll(text, cache="full", chunk=chunk)
        np.testing.assert_allclose(nll, want, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("sink", "full"), ("block", "full")])
def test_a_window_as_long_as_the_text_leaves_a_layer_its_pattern(kinds):
    lm, text = model(*kinds), tokens(1, LENGTH)
    nll = lm.nll(text, cache=f"window:window={LENGTH}", chunk=16)
    np.testing.assert_allclose(nll, dense_nll(lm, text), atol=3e-5)


@pytest.mark.parametrize("change", [SINK, BLOCK])
def test_packed_documents_see_their_own_sinks_and_stripes(change):
    made = config(change)
    params = lively(init_params(made, jax.random.key(0)))
    text, cut = jnp.asarray(tokens(1, 32)), 11
    ids = jnp.where(jnp.arange(32) < cut, 1, 2)[None]

    @jax.jit
    def hidden(params, text, segments=None):
        return Decoder(made).apply({"params": params}, text, segments=segments)[0]

    packed = hidden(params, text, ids)
    alone = [hidden(params, text[:, :cut]), hidden(params, text[:, cut:])]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), atol=3e-5)


@pytest.mark.parametrize("change", [SINK, BLOCK])
def test_evaluating_a_mask_on_positions_gives_attention_under_it(change):
    spec = config(change).layers[0].mixer
    rng, mask = np.random.default_rng(0), layer_mask(spec)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, 19, n, 8)), jnp.float32) for n in (4, 2, 2)
    )
    at = jnp.arange(19)[None]

    def ours(q, k, v):
        slots = (jnp.swapaxes(x, 1, 2) for x in (k, v))
        return masked_attention(q, *slots, at, at, mask=mask)

    def oracle(q, k, v):
        return attend(Spec(mask, 8**-0.5), q, k, v, None, None, None)

    def loss(q, k, v, run):
        out, lse = run(q, k, v)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    for got, want in zip(ours(q, k, v), oracle(q, k, v), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)
    slope = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    for got, want in zip(slope(q, k, v, ours), slope(q, k, v, oracle), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


BANDS = {
    "stripes": patterns.block_sparse(4, 2, 3, kv_heads=2),
    "sinks": patterns.sink_window(3, 6),
    "chunks": patterns.chunk(8),
    "both": patterns.chunk(4) | patterns.sink_window(2, 3),
}


@pytest.mark.parametrize("slots", [40, 27])
@pytest.mark.parametrize("name", BANDS)
def test_a_decoding_step_over_seen_blocks_equals_the_row_of_the_mask(
    name, slots, monkeypatch
):
    """Rows of every fill, one of them reading padding; the rest is never touched."""
    monkeypatch.setattr(masked, "BLOCK", 2)
    mask, rng = BANDS[name], np.random.default_rng(0)
    start = np.array([0, 1, 5, 12, 23, slots - 1, slots, slots])
    at, cells = np.where(np.arange(8) == 7, -1, start)[:, None], np.arange(slots)
    pos = np.where(cells < start[:, None], cells, -1)[:, None]
    q, k, v = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((8, 1, 4, 8), (8, 2, slots, 8), (8, 2, slots, 8))
    )
    args = jnp.asarray(at), jnp.asarray(pos)
    want = masked_attention(q, k, v, *args, mask=mask)
    rows = [mask.array(1, slots, 4, offset=p)[:, 0] for p in start]
    dark = ~np.broadcast_to(np.stack(rows), (8, 4, slots))[:, ::2]  # of kv heads
    dark[7], dark[..., 0] = True, False  # the first slot stands in for hidden ones
    holes = (jnp.where(dark[..., None], jnp.nan, x) for x in (k, v))
    step = jax.jit(functools.partial(step_attention, mask=mask))
    moved = (jnp.roll(x, 3, 2) for x in (k, v))  # slots that are not positions
    for values, places in ((holes, args[1]), (moved, jnp.roll(args[1], 3, 2))):
        out, lse = step(q, *values, args[0], places)
        np.testing.assert_allclose(out, want[0], atol=2e-6)
        np.testing.assert_allclose(lse, want[1], atol=2e-6)


def test_a_sink_and_window_layer_stores_no_more_than_it_sees():
    made, policy = config(SINK), policies.make("full")
    small, large = (
        measured_bytes(init_states(made, policy, 1, n, jnp.float32)) for n in (16, 512)
    )
    slots = SINK["sinks"] + SINK["window"] - 1
    assert small == large == slots * (2 * 2 * 8 * 4) + slots * 4


@pytest.mark.slow
def test_generation_follows_the_dense_pass():
    lm, prompt = model("sink", "full"), tokens(1, 13)[0].tolist()
    made = lm.generate(prompt, 10, chunk=16).tokens
    dense = np.asarray(lm.logits(np.array([prompt + made])))[0]
    assert made == dense[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_a_long_window_or_every_stripe_is_full_attention():
    text = tokens(1, 24)
    params = lively(init_params(config({}), jax.random.key(0)))
    want = LanguageModel(config({}), params).logits(text)
    everything = "block_sparse:block=4,local=1,stride=1"
    for change in ({"window": 24, "sinks": 2}, {"pattern": everything}):
        got = LanguageModel(config(change), params).logits(text)
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_middle_third_is_full_and_the_rest_is_sparse():
    made = longgen(preset("llama-2-7b"))
    assert [run.repeats for run in made.stack] == [10, 12, 10]
    sparse, full, last = (run.group[0].mixer for run in made.stack)
    assert sparse == last and (sparse.sinks, sparse.window) == (64, 1984)
    assert not full.static and full.window is None
    assert made.context == full.rope.context == 131072


def test_key_value_memory_shrinks_by_the_published_share():
    """arXiv 2410.01485: 62% less at 128k."""
    policy = policies.make("full")

    def held(made: ModelConfig) -> int:
        shapes = jax.eval_shape(
            lambda: init_states(made, policy, 1, 131072, jnp.bfloat16)
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    base = preset("llama-2-7b")
    assert 0.60 < 1 - held(longgen(base)) / held(base) < 0.63


def test_infini_layers_compute_what_the_base_does_inside_one_segment():
    base = tiny_config()
    params = lively(init_params(base, jax.random.key(0)))
    made = infini(base, segment=24)
    text = tokens(2, 24)
    got = LanguageModel(made, infini_params(made, params)).logits(text)
    np.testing.assert_allclose(got, LanguageModel(base, params).logits(text), atol=2e-5)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: AttentionSpec(4, 2, 8, sinks=3), "window=None"),
        (lambda: AttentionSpec(4, 2, 8, window=4, pattern="causal"), "in place of"),
        (lambda: longgen(tiny_config(), full=1), "halve around"),
        (lambda: longgen(tiny_config(windows=(None, 4))), "full attention"),
        (lambda: layer_mask(AttentionSpec(4, 2, 8, pattern="strided")), "strided"),
        (
            lambda: layer_mask(
                AttentionSpec(4, 2, 8, pattern="block_sparse:kv_heads=3")
            ),
            "kv_heads=3",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, text):
    with pytest.raises(LclmError, match=text):
        make()
