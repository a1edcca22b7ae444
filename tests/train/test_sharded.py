"""Laws of a training step on a mesh: the numbers of one device, from parts."""

import pytest

HEAD = "from tests.train.meshes import same\n"
FAST = """
lora = dict(rank=2, on=[r"(attn/[qkvo]|mlp/(gate|down))/weight$"])
same("plain", dict(fsdp=4, tensor=2), model=dict(source="tiny", lora=lora))
same("moe", dict(data=2, fsdp=2, expert=2))
"""
SLOW = """
same("plain", dict(data=2, fsdp=2, tensor=2), accumulate=2)
same("plain", dict(data=8))
same("plain", dict(fsdp=8), packed=False)
same("plain", dict(data=2, fsdp=4), accumulate=1, remat=dict(kind="full"))
same("dressed", dict(data=2, fsdp=2, tensor=2), scan=False)
same("dressed", dict(fsdp=2, tensor=2, data=2), remat=dict(kind="attention"))
same("s2", dict(data=2, tensor=2, fsdp=2))
same("mamba", dict(data=2, fsdp=4))
same("mamba", dict(data=2, fsdp=2, tensor=2))
same("moe", dict(data=2, fsdp=4), accumulate=1)
same("moe", dict(data=1, expert=4, tensor=2))
"""
STEPS = """
import jax, numpy as np, tempfile
from pathlib import Path
from tests.train.meshes import batch, run_of, trainer

class Same:
    def __next__(self):
        return batch()

def fitted(**changes):
    made = trainer("plain", run_of(log_every=1, **changes))
    told = []
    with tempfile.TemporaryDirectory() as folder:
        done = made.fit(Same(), Path(folder), lambda step, record: told.append(record))
    return told, done

want, one = fitted()
got, many = fitted(mesh=dict(data=2, fsdp=2, tensor=2))
for a, b in zip(want, got, strict=True):
    np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
    np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-5)
for path, leaf in one.params.items():
    np.testing.assert_allclose(many.params[path], leaf, rtol=1e-3, atol=1e-4)
whole = sum(x.nbytes for x in jax.tree.leaves(many.state.opt))
first = jax.devices()[0]
held = sum(
    shard.data.nbytes
    for x in jax.tree.leaves(many.state.opt)
    for shard in x.addressable_shards
    if shard.device == first
)
assert held < whole / 3, (held, whole)
print("steps agree")
"""
REFUSED = """
from lclm.errors import LclmError
from lclm.train.layout import make_layout
from tests.train.meshes import MODELS, run_of

def told(name, mesh, **changes):
    try:
        make_layout(run_of(mesh=mesh, **changes), MODELS[name]())
    except LclmError as error:
        return str(error)
    return "nothing"

def refused(words, *args, **changes):
    found = told(*args, **changes)
    assert words in found, (words, found)

refused("does not fit 8 devices", "plain", dict(data=16))
refused("batch 6 does not split over data x fsdp = 8", "plain", dict(fsdp=8), batch=6)
refused("make batch a multiple of 16", "plain", dict(data=8), accumulate=2)
refused("tensor=4 does not divide the 2 kv heads", "plain", dict(data=2, tensor=4))
refused("expert=8 does not divide the 4 experts", "moe", dict(expert=8))
refused("without experts", "plain", dict(data=4, expert=2))
refused("'infini', whose state runs", "infini", dict(data=4, context_ring=2))
refused("hand on a state", "mamba", dict(data=4, context_ring=2, context="ring"))
refused("3 tokens back", "mamba", dict(context_ring=8), length=16)
refused("multiple of 16", "plain", dict(context_ring=8), length=24)
refused("multiple of 8", "plain", dict(context_ulysses=4, context_ring=2), length=28)
refused("8 does not divide the 4 query heads", "plain", dict(context_ulysses=8))
refused("'halo' on 4 ring parts", "plain", dict(data=2, context_ring=4, context="halo"))
refused("did you mean 'ring'", "plain", dict(context_ring=8, context="rng"))
refused("looks into attention", "plain", dict(data=4, tensor=2), objective="duo_gates")
print("all refused")
"""


def test_loss_and_gradients_are_those_of_one_device(on_devices):
    assert on_devices(HEAD + FAST).count("same:") == 2


@pytest.mark.slow
def test_loss_and_gradients_on_every_kind_of_mesh(on_devices):
    assert on_devices(HEAD + SLOW, timeout=900).count("same:") == 11


@pytest.mark.slow
def test_steps_on_a_mesh_train_the_same_model_with_state_in_parts(on_devices):
    assert "steps agree" in on_devices(STEPS)


def test_a_mesh_that_does_not_suit_is_refused_before_anything_is_compiled(on_devices):
    assert "all refused" in on_devices(REFUSED)
