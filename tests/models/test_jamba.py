"""Jamba: attention, Mamba and experts in one stack, at any split and packing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lclm.blocks.layer import init_states, state_bytes
from lclm.cache import make
from lclm.config import AttentionSpec, MlpSpec, ModelConfig, find_runs
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.models.decoder import Decoder, init_params, stack_params, unembed
from lclm.models.jamba_presets import every, jamba_stack
from lclm.models.presets import preset
from lclm.models.remat import RematSpec
from lclm.ops import moe
from lclm.specs import MambaSpec, MoeSpec
from tests.tiny import VOCAB, dense_nll, lively, tokens

MIXERS = (
    MambaSpec(32, 4, state=4, inner_norms=True),
    AttentionSpec(4, 2, 4, rope=None),
)
MLPS = (MlpSpec(24), MoeSpec(24, 4))
PERIODS = {"attention_every": (4, 2), "experts_every": (2, 1)}


def tiny_jamba(depth: int = 4, **periods) -> ModelConfig:
    stack = jamba_stack(depth, MIXERS, MLPS, **PERIODS | periods)
    return ModelConfig("jamba", VOCAB, 16, stack, 64, tied=False)


@functools.cache
def tiny_lm() -> LanguageModel:
    config = tiny_jamba()
    return LanguageModel(config, lively(init_params(config, jax.random.key(0))))


def program(config: ModelConfig, *, scan: bool = False):
    """(hidden states, router collection) of a batch, compiled."""

    @jax.jit
    def run(params, text, segments):
        (hidden, _), out = Decoder(config, scan=scan).apply(
            {"params": params}, text, segments=segments, mutable=["router"]
        )
        return hidden, out["router"]

    return run


def close(found, expected, relative: float = 2e-5):
    limit = relative * max(1.0, float(jnp.abs(expected).max()))
    assert float(jnp.abs(found - expected).max()) <= limit


@pytest.mark.slow
def test_a_scan_over_periods_equals_the_unrolled_model_and_its_routers():
    config = tiny_jamba(4, attention_every=(2, 1))
    assert len(config.stack) == 1 and config.stack[0].repeats == 2
    params = lively(init_params(config, jax.random.key(1)), 0.1)
    text = jnp.asarray(tokens(2, 11))
    segments = jnp.ones_like(text).at[1, 7:].set(0)
    hidden, router = program(config)(params, text, segments)
    scanned, stacked = program(config, scan=True)(
        stack_params(config, params), text, segments
    )
    valid = segments > 0
    close(
        jnp.where(valid[..., None], scanned, 0), jnp.where(valid[..., None], hidden, 0)
    )
    close(moe.aux_loss(stacked, valid), moe.aux_loss(router, valid))


@pytest.mark.slow
def test_packed_documents_compute_what_they_do_alone_gradients_too():
    config, params = tiny_jamba(), tiny_lm().params
    text = tokens(2, 12, seed=3)
    sizes = (5, 7)

    @jax.jit
    def slopes(params, text, segments):
        def loss(params):
            hidden, _ = Decoder(config).apply({"params": params}, text, None, segments)
            return (jnp.sin(hidden) * (segments > 0)[..., None]).sum()

        return jax.grad(loss)(params)

    packed = jnp.asarray(np.concatenate([text[0, :5], text[1, :7]])[None])
    ids = jnp.asarray(np.repeat([1, 2], sizes)[None])
    alone = [
        jnp.asarray(np.pad(t[:n], (0, 12 - n))[None])
        for t, n in zip(text, sizes, strict=True)
    ]
    masks = [jnp.asarray((np.arange(12) < n).astype(np.int32)[None]) for n in sizes]
    run = program(config)
    whole, _ = run(params, packed, ids)
    parts = [
        run(params, t, m)[0][0, :n] for t, m, n in zip(alone, masks, sizes, strict=True)
    ]
    close(whole[0], jnp.concatenate(parts))
    one = slopes(params, packed, ids)
    two = [slopes(params, t, m) for t, m in zip(alone, masks, strict=True)]
    jax.tree.map(lambda a, b, c: close(a, b + c, 5e-5), one, *two)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 5])
def test_losses_read_in_chunks_are_those_of_one_shot(chunk):
    lm, text = tiny_lm(), tokens(2, 23)
    np.testing.assert_allclose(
        lm.nll(text, chunk=chunk), dense_nll(lm, text), rtol=2e-4, atol=2e-4
    )


@pytest.mark.slow
def test_a_ragged_batch_generates_what_each_row_does_alone():
    lm, text = tiny_lm(), tokens(2, 9)
    prompts = [text[0, :9].tolist(), text[1, :4].tolist()]
    both = lm.generate(prompts, max_new_tokens=5)
    for prompt, row in zip(prompts, both, strict=True):
        assert row.tokens == lm.generate(prompt, max_new_tokens=5).tokens


@pytest.mark.slow
def test_jamba_and_its_balance_train_on_a_repeated_text():
    config = tiny_jamba()
    params = stack_params(config, init_params(config, jax.random.key(0)))
    text = jnp.asarray(np.tile(np.arange(1, 7), 4)[None])
    model = Decoder(config, scan=True, remat=RematSpec("full"))
    optimizer = optax.adam(1e-2)

    def loss(params):
        (hidden, _), out = model.apply({"params": params}, text, mutable=["router"])
        logp = jax.nn.log_softmax(unembed(config, params, hidden)[:, :-1])
        task = -jnp.take_along_axis(logp, text[:, 1:, None], -1).mean()
        balance = moe.aux_loss(out["router"])
        return task + 0.01 * balance, (task, balance)

    @jax.jit
    def step(params, state):
        grads, values = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, values

    state, first = optimizer.init(params), None
    for _ in range(80):
        params, state, (task, balance) = step(params, state)
        first = first or float(task)
    assert first > 3 and float(task) < 0.2
    assert 1.9 < float(balance) < 4


def test_jamba_at_256k_holds_four_gibibytes_of_keys_and_values():
    config, gib = preset("jamba-v0.1"), 2**30
    length = 262144
    total = state_bytes(config, make("full"), 1, length, jnp.bfloat16)
    attends = [isinstance(s.mixer, AttentionSpec) for s in config.layers]
    assert np.nonzero(attends)[0].tolist() == [4, 12, 20, 28]
    recurrent = 28 * (16 + 3) * 8192 * 4
    keys = 4 * length * 2 * 8 * 128 * 2
    assert keys == 4 * gib
    bookkeeping = total - keys - recurrent
    assert 0 <= bookkeeping < 0.01 * keys
    shorter = state_bytes(config, make("full"), 1, length // 2, jnp.bfloat16)
    assert total - shorter == pytest.approx(keys / 2, rel=0.01)


def test_planned_bytes_are_the_allocated_ones():
    config, policy = tiny_jamba(), make("full")
    states = init_states(config, policy, 3, 40, jnp.float32)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(states))
    assert held == state_bytes(config, policy, 3, 40, jnp.float32)


def test_the_pattern_puts_attention_and_experts_where_it_says():
    assert every(8, 4, 2, what="attention") == (False, False, True, False) * 2
    layers = tiny_jamba(8).layers
    mixers = "".join("am"[isinstance(s.mixer, MambaSpec)] for s in layers)
    assert mixers == "mmammmam"
    assert "".join("de"[isinstance(s.mlp, MoeSpec)] for s in layers) == "dededede"
    long = jamba_stack(24, MIXERS, MLPS, attention_every=(12, 0))
    assert len(long) == 1 and len(long[0].group) == 12
    assert find_runs(preset("jamba-1.5-large").layers)[0].repeats == 9


@pytest.mark.parametrize(
    "depth,changes,words",
    [
        (6, {}, "6 layers do not divide into periods of 4"),
        (12, {"experts_every": (3, 0), "attention_every": (8, 0)}, "periods of 24"),
        (4, {"attention_every": (4, 4)}, "attention layer offset is 4"),
        (4, {"experts_every": (2, -1)}, "an offset is 0 to 1"),
        (4, {"experts_every": (0, 0)}, "expert layer period is 0"),
    ],
)
def test_periods_and_offsets_that_cannot_be_are_refused(depth, changes, words):
    with pytest.raises(LclmError, match=words):
        jamba_stack(depth, MIXERS, MLPS, **PERIODS | changes)
