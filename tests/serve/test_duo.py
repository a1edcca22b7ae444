"""DuoAttention's laws: per-head masks, two capacities, gates that fit their model."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import cache as policies
from lclm import learned
from lclm.cache.base import Heads, Layer, measured_bytes
from lclm.cache.duo import Duo, binarised
from lclm.cache.step import make_step
from lclm.errors import LclmError
from lclm.learned import Extra, fingerprint, save_extra, shape
from lclm.models.presets import preset
from lclm.ops.rope import angles, rotate
from lclm.serve.session import Session
from pallas_kernels import mask as masks
from tests.serve.test_policies import SPEC, random_heads
from tests.tiny import dense_nll, tiny_config, tiny_lm, tokens

S, R = 3, 5
PAIRS = [*itertools.product([True, False], repeat=2)]
MIXED = ((True, False), (False, True))
DUO = Duo(sinks=S, window=R, heads=MIXED)


def by_mask(heads, full: tuple[bool, ...], sinks: int, window: int) -> np.ndarray:
    """One pass under the mask of each head, from the mask algebra."""
    T = heads.q.shape[1]
    at = jnp.arange(T, dtype=jnp.int32)[None]
    tables = angles(at, SPEC.rope, SPEC.head_dim)
    q, k = rotate(heads.q, *tables), rotate(heads.k, *tables)
    near = masks.window(window + 1) | masks.sink(sinks)
    each = SPEC.heads // SPEC.kv_heads
    mask = masks.per_head(
        [
            masks.causal() if f else masks.causal() & near
            for f in full
            for _ in range(each)
        ]
    )
    seen = jnp.stack(
        [m.visible(at[0][:, None], at[0][None]) for m in mask.layout(SPEC.heads)]
    )
    k, v = (jnp.repeat(x, each, 2) for x in (k, heads.v))
    scores = jnp.einsum("bqnh,bsnh->bnqs", q, k) * SPEC.head_dim**-0.5
    p = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return np.asarray(jnp.einsum("bnqs,bsnh->bqnh", p, v))


@functools.partial(jax.jit, static_argnums=0)
def call(duo: Duo, cache, part: Heads, start):
    places = start + jnp.arange(part.q.shape[1], dtype=jnp.int32)[None]
    step = make_step(tiny_config(), places, start=start[None])
    return duo.attend(cache, part, step, Layer(0, SPEC))


def run(duo: Duo, heads: Heads, widths: list[int]):
    """The policy's attention over calls of these widths, and the cache behind them."""
    cache = duo.init(Layer(0, SPEC), 1, sum(widths), jnp.float32)
    outs, at = [], 0
    for width in widths:
        part = Heads(*(x[:, at : at + width] for x in (heads.q, heads.k, heads.v)))
        out, cache = call(duo, cache, part, jnp.int32(at))
        outs.append(out)
        at += width
    return jnp.concatenate(outs, 1), cache


@pytest.mark.parametrize(
    ("full", "sinks"),
    [((True, False), S), ((False, True), 0), ((False, False), S)],
)
def test_any_chunk_equals_one_pass_under_the_mask_of_each_head(full, sinks):
    heads = random_heads(29)
    duo = Duo(sinks=sinks, window=R, heads=(full,))
    want = by_mask(heads, full, sinks, R)
    for widths in ([7] * 4 + [1], [1] * 29, [1, 7, 1, 1, 7, 1, 1, 7, 1, 1, 1]):
        out, cache = run(duo, heads, widths)
        np.testing.assert_allclose(out, want, atol=2e-5)
        held = sorted(np.asarray(cache.groups[-1].pos).reshape(-1).tolist())
        assert held == [*range(sinks), *range(29 - R, 29)]
    number = [full.count(True), full.count(False)]
    shapes = [(1, n, c, 8) for n, c in zip(number, (29, sinks + R), strict=True) if n]
    assert [g.k.shape for g in cache.groups] == shapes


@pytest.mark.parametrize(
    "duo", [Duo(gates="random", sparsity=0.0), Duo(S, 37, 1.0, "random")]
)
def test_no_streaming_heads_or_a_window_over_everything_is_full_attention(duo):
    text = tokens(2, 40)
    got = tiny_lm().nll(text, cache=duo, chunk=16)
    np.testing.assert_allclose(got, dense_nll(tiny_lm(), text), atol=3e-5)


def test_bytes_are_those_of_the_two_capacities():
    lm, T = tiny_lm(), 40
    rows, size, number = 3, 8, 4
    for heads in itertools.product(
        itertools.product([True, False], repeat=2), repeat=2
    ):
        duo = dataclasses.replace(DUO, heads=heads)
        held = Session(lm._engine, duo, rows=rows, length=T, chunk=16)
        k_and_v = measured_bytes([(g.k, g.v) for c in held.caches for g in c.groups])
        full = sum(sum(layer) for layer in heads)
        slots = full * T + (4 - full) * (S + R)
        assert k_and_v == 2 * size * number * rows * slots
        assert lm.cache_bytes(duo, T, batch=rows) == measured_bytes(held.caches)


@pytest.mark.parametrize("ties", [False, True])
def test_a_sparsity_gives_an_exact_count_of_full_heads(ties):
    rng = np.random.default_rng(0)
    alpha = rng.uniform(-0.2, 1.3, (6, 3)).round() if ties else rng.random((6, 3))
    for sparsity in (0.0, 0.1, 0.25, 0.5, 0.8, 0.97, 1.0):
        full = np.asarray(binarised(alpha, sparsity))
        assert full.shape == alpha.shape
        wanted = {0: 18, 1: 0}.get(sparsity, 18 - int(np.ceil(sparsity * 17)))
        assert full.sum() == wanted
        clipped = np.clip(alpha, 0, 1)
        assert clipped[full].min(initial=1) >= clipped[~full].max(initial=0)
        if not ties and 0 < sparsity < 1:
            assert full.tolist() == (alpha >= np.quantile(alpha, sparsity)).tolist()


def gates_for(config, path, alpha=((1.0, 0.2), (0.1, 0.9)), **changes):
    extra = Extra(
        "duo_gates",
        "a-model",
        {"alpha": np.array(alpha, np.float32)},
        shape(config) | changes,
        weights=fingerprint(tiny_lm().params["embed"]["table"]),
    )
    return str(save_extra(path, extra))


def test_gates_are_read_from_a_file_made_for_this_model(tmp_path, monkeypatch):
    config = tiny_config()
    duo = policies.make(f"duo:gates={gates_for(config, tmp_path)},sparsity=0.5")
    ready, params = duo.resolve(config)
    assert ready.heads == MIXED and params is None
    assert ready.resolve(config) == (ready, None)
    monkeypatch.setattr(learned, "FOLDER", tmp_path)
    assert policies.make("duo").resolve(config)[0].heads == MIXED


def test_gates_come_with_lclm_for_smollm2():
    config = preset("smollm2-135m")
    for sparsity, full in ((0.5, 45), (0.75, 23)):
        heads = Duo(sparsity=sparsity).resolve(config)[0].heads
        assert sum(map(sum, heads)) == full
    assert Duo(sparsity=1.0).resolve(config)[0].kept == 64 + 256


def test_gates_of_another_model_are_refused(tmp_path, monkeypatch):
    config = tiny_config()
    path = gates_for(config, tmp_path, width=64)
    with pytest.raises(LclmError, match=r"a-model.*width 64.*width 32.*duo:gates=FILE"):
        tiny_lm().nll(tokens(1, 8), cache=f"duo:gates={path}")
    monkeypatch.setattr(learned, "FOLDER", tmp_path)
    with pytest.raises(LclmError, match=r"for a-model, but.*width 32.*duo_gates.py"):
        tiny_lm().cache_bytes("duo", 8)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("duo:sparsity=1.5", "sparsity is 1.5"),
        ("duo:window=0", "at least 1"),
        ("duo:gates=nowhere.safetensors", "no such file"),
        ("duo:gates=random:x", "random:SEED"),
        (Duo(heads=((True,),)), "this model has 2"),
    ],
)
def test_a_bad_duo_is_one_clear_error(policy, says):
    with pytest.raises(LclmError, match=says):
        tiny_lm().cache_bytes(policy, 8)


def test_the_same_seed_draws_the_same_gates_and_the_same_count():
    config = tiny_config()
    drawn = [
        Duo(gates=f"random:{seed}").resolve(config)[0].heads for seed in (1, 1, 2, 3, 4)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert {sum(map(sum, heads)) for heads in drawn} == {2}


@pytest.mark.slow
def test_a_saved_context_keeps_its_heads_and_needs_no_gates(tmp_path):
    lm = tiny_lm()
    gates = gates_for(lm.config, tmp_path)
    duo = f"duo:sinks={S},window={R},gates={gates}"
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (7, 30)]
    context = lm.prefill(rows, cache=duo, chunk=16)
    context.save(tmp_path / "context")
    (tmp_path / learned.NAME).unlink()
    again = lm.load_context(tmp_path / "context")
    assert again.session.policy == context.session.policy
    want = [made.tokens for made in context.generate([5, 6], 4)]
    assert [made.tokens for made in again.generate([5, 6], 4)] == want
