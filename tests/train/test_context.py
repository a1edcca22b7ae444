"""Laws of rows that devices share: the numbers of one device, in few exchanges."""

import numpy as np
import pytest

from lclm.attention.context import Context, Pattern, choose
from lclm.attention.ring import relation
from pallas_kernels import mask as masks

HEAD = "from tests.train.meshes import same\n"
# Ulysses, both kinds of parts at once, states: the product is slow.
FAST = """
same("s2rows", dict(data=2, context_ulysses=4))
same("mqa", dict(context_ring=2, context_ulysses=4, context="ring"), packed=False)
same("mamba", dict(data=2, context_ring=2, context_ulysses=2))
"""
# States go from device to device: rows in order, gathered keys or a halo beside them.
STATES = """
for name in ("mamba", "mamba2"):
    for packed in (True, False):
        same(name, dict(data=2, context_ring=4), packed=packed)
        same(name, dict(context_ring=2, context_ulysses=4), packed=packed)
    same(name, dict(fsdp=2, tensor=2, context_ring=2), accumulate=2)
"""
# "auto" gathers, and takes the halo where all layers have windows that fit.
PRODUCT = """
meshes = [
    dict(data=2, context_ulysses=4),
    dict(data=2, context_ring=4, context="ring"),
    dict(data=2, context_ring=4, context="gather"),
    dict(context_ring=4, context_ulysses=2, context="ring"),
    dict(data=2, context_ring=4),
    dict(fsdp=2, tensor=2, context_ring=2, context="ring"),
]
for name in ("plain", "dressed", "window", "mixed", "s2", "s2rows", "sinks", "wide"):
    for mesh in meshes:
        for packed in (True, False):
            same(name, mesh, packed=packed)
same("mqa", dict(context_ulysses=4, context_ring=2))
same("wide", dict(context_ring=4, data=2, context="ring"), remat=dict(kind="attention"))
same("moe", dict(fsdp=2, expert=2, context_ring=2, context="ring"))
same("plain", dict(context_ring=8, context="ring"), accumulate=4, batch=8, length=32)
"""
# Without document ids the patterns lie on places in the row.
ATTENTION = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from lclm.attention.context import ALONE, Context, Pattern, Tokens, attend
from lclm.sharding import BATCH, SEQUENCE, make_mesh
from pallas_kernels import mask as masks

T, rng = 64, np.random.default_rng(0)
q, k, v, g = (jnp.asarray(rng.standard_normal((1, T, n, 8)), jnp.float32)
              for n in (4, 2, 2, 4))
places = jnp.arange(T, dtype=jnp.int32)[None]

def spread(context, pattern, ids=None):
    mesh = make_mesh(kind=AxisType.Auto, data=8 // context.devices,
                     context_ring=context.ring, context_ulysses=context.ulysses)
    order = context.places(T)
    back = np.argsort(order)
    def local(q, k, v, at, ids):
        return attend(pattern, q, k, v, Tokens(at, ids), context=context)
    row = P(None, SEQUENCE)
    fn = jax.shard_map(local, mesh=mesh, in_specs=(row,) * 5, out_specs=row,
                       check_vma=False)
    def call(q, k, v):
        ins = [None if x is None else x[:, order] for x in (q, k, v, places, ids)]
        return fn(*ins)[:, back]
    return call

def both(call):
    out, back = jax.vjp(call, q, k, v)
    return out, *back(g)

def same(context, mask, ids=None):
    pattern = Pattern(mask, 4)
    want = jax.jit(lambda: both(lambda *x: attend(pattern, *x, Tokens(places, ids))))()
    got = jax.jit(lambda: both(spread(context, pattern, ids)))()
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
"""
LAID = """
zigzag = Context(4, 1, "zigzag", "ring")
patterns = [
    masks.causal() & masks.group(16),
    masks.causal() & (masks.window(9) | masks.sink(3)),
    masks.causal() & masks.block_sparse(8, 1, 3, kv_heads=2),
]
for mask in patterns:
    same(zigzag, mask)
    same(Context(4, 1, "zigzag", "gather"), mask)
    same(Context(2, 2, "zigzag", "ring"), mask)
print("patterns agree")
"""
EXCHANGES = """
def text(context, mask=masks.causal(), back=False):
    call = spread(context, Pattern(mask, 4))
    fn = (lambda q, k, v: jax.vjp(call, q, k, v)[1](g)) if back else call
    made = jax.jit(fn).lower(q, k, v).as_text()
    start = made.index("manual_computation") if "manual_computation" in made else 0
    return made[start:]

def count(text, name):
    return text.count(f'"stablehlo.{name}"')

for R in (2, 4, 8):
    hlo = text(Context(R, 1, "zigzag", "ring"))
    assert count(hlo, "collective_permute") == R - 1, count(hlo, "collective_permute")
    assert count(hlo, "all_gather") == 0
    assert count(hlo, "case") == R - 1, "the first hop is alike on all devices"
hlo = text(Context(4, 1, "zigzag", "gather"))
assert count(hlo, "all_gather") == 2 and count(hlo, "collective_permute") == 0
hlo = text(Context(1, 4, "contiguous"))
assert count(hlo, "all_to_all") == 4, count(hlo, "all_to_all")
window = masks.causal() & masks.window(9)
hlo = text(Context(4, 1, "contiguous"), window)
assert count(hlo, "collective_permute") == 3 and count(hlo, "all_gather") == 0

# Documents of one piece: every hop but the first is masked, and adds exactly nothing.
ids = jnp.asarray(np.arange(T) // 8, jnp.int32)[None]
ring = Context(4, 1, "zigzag", "ring")
out = jax.jit(spread(ring, Pattern(masks.causal(), 4), ids))(q, k, v)
k9, v9 = k.at[:, :-8].set(1e9), v.at[:, :-8].set(1e9)
far = jax.jit(spread(ring, Pattern(masks.causal(), 4), ids))(q, k9, v9)
np.testing.assert_array_equal(far[:, -8:], out[:, -8:])
print("exchanges counted")
"""


def test_loss_and_gradients_of_shared_rows_are_those_of_one_device(on_devices):
    assert on_devices(HEAD + FAST).count("same:") == 3


@pytest.mark.slow
def test_every_strategy_agrees_for_every_mask(on_devices):
    assert on_devices(HEAD + PRODUCT, timeout=3000).count("same:") == 100


@pytest.mark.slow
def test_recurrent_layers_hand_their_states_from_device_to_device(on_devices):
    assert on_devices(HEAD + STATES, timeout=900).count("same:") == 10


@pytest.mark.slow
def test_patterns_on_places_in_the_row_agree(on_devices):
    assert "patterns agree" in on_devices(ATTENTION + LAID, timeout=900)


@pytest.mark.slow
def test_a_ring_makes_one_exchange_less_than_it_has_parts(on_devices):
    assert "exchanges counted" in on_devices(ATTENTION + EXCHANGES)


@pytest.mark.parametrize("ring", [2, 3, 4, 8])
def test_an_order_and_its_inverse_are_the_identity_and_share_work_evenly(ring):
    context = Context(ring, 1, "zigzag")
    for length in range(2 * ring, 50 * ring, 6 * ring):
        places = context.places(length)
        assert sorted(places) == list(range(length))
        np.testing.assert_array_equal(places[np.argsort(places)], np.arange(length))
        seen = (places + 1).reshape(ring, -1).sum(1)
        assert len(set(seen)) == 1, "causal pairs of each device"


def test_a_causal_hop_has_two_forms_and_a_hidden_one_none():
    mask, heads, size, ring = masks.causal(), 4, 16, 4
    starts = [(r, 2 * ring - 1 - r) for r in range(ring)]
    forms = {
        relation(mask, heads, size, starts[r], starts[(r - hop) % ring])
        for hop in range(1, ring)
        for r in range(ring)
    }
    assert len(forms) == 2
    assert {form.pairs(32, 32) for form in forms} == {2 * size * size}
    near = masks.causal() & masks.window(8)
    assert relation(near, heads, size, (3, 4), (0, 7)) is None


@pytest.mark.parametrize(
    ("order", "asked", "own", "numbers", "want"),
    [
        ("contiguous", "auto", False, 1, "halo"),
        ("contiguous", "auto", True, 1, "gather"),
        ("zigzag", "auto", False, 1 << 20, "gather"),
        ("zigzag", "auto", False, 1 << 30, "ring"),
        ("zigzag", "ring", False, 1, "ring"),
        ("zigzag", "ring", True, 1, "gather"),
    ],
)
def test_the_strategy_follows_from_the_shapes(order, asked, own, numbers, want):
    pattern = Pattern(masks.causal(), 4, own=own)
    assert choose(Context(4, 1, order, asked), pattern, numbers) == want
