"""Laws of placement: identity without a mesh, the same numbers with one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm import sharding
from lclm.errors import LclmError

ON_EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from lclm import sharding
from lclm.sharding import local, make_mesh, param_sharding, place, shard

def attend(q, k):
    return jnp.einsum("btkgh,bskh->btkgs", q.reshape(*k.shape[:3], -1, 4), k)

def spec(x):
    return jax.typeof(x).sharding.spec

rng = np.random.default_rng(0)
q = rng.standard_normal((4, 8, 4, 4)).astype(np.float32)
k = rng.standard_normal((4, 8, 2, 4)).astype(np.float32)
odd = rng.standard_normal((4, 8, 1, 4)).astype(np.float32)
want, want_odd = attend(q, k), attend(q, odd)

with jax.set_mesh(make_mesh(fsdp=4, tensor=2)) as _:
    x = shard(jnp.asarray(q), "batch", "seq", "heads", None)
    assert spec(x) == P("fsdp", None, "tensor", None), spec(x)
    assert spec(shard(jnp.zeros((3, 2)), "batch", "ffn")) == P(None, "tensor")
    axes = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    inner = []
    def seen(q, k):
        inner.append(q.shape)
        return attend(shard(q, *axes[0]), k)
    run = local(seen, axes, ("batch", None, "kv_heads", None, None))
    got = jax.jit(run)(jnp.asarray(q), jnp.asarray(k))
    assert inner[-1] == (1, 8, 2, 4), inner
    assert spec(got) == P("fsdp", None, "tensor", None, None), spec(got)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    got = jax.jit(run)(jnp.asarray(q), jnp.asarray(odd))
    assert inner[-1] == (1, 8, 4, 4), "one kv head: query heads stay together"
    np.testing.assert_allclose(got, want_odd, rtol=1e-6, atol=1e-6)
    grad = jax.grad(lambda q: run(q, jnp.asarray(k)).sum())(jnp.asarray(q))
    plain = jax.grad(lambda q: attend(q, k).sum())(q)
    np.testing.assert_allclose(grad, plain, rtol=1e-5, atol=1e-5)

mesh = make_mesh(fsdp=-1, tensor=2)
assert mesh.shape["fsdp"] == 4 and mesh.shape["data"] == 1
params = {
    "embed": {"table": np.zeros((16, 8))},
    "layers_0": {
        "attn": {
            "k": {"weight": np.zeros((6, 8)), "bias": np.zeros(6)},
            "o": {"weight": np.zeros((8, 12)), "bias": np.zeros(8)},
        },
        "mlp": {"down": {"weight": np.ones((8, 10))}},
        "norm1": {"scale": np.zeros(8)},
    },
}
placed = place(params, mesh)
layer = placed["layers_0"]
assert placed["embed"]["table"].sharding.spec == P("tensor", "fsdp")
assert layer["attn"]["k"]["weight"].sharding.spec == P("tensor", "fsdp")
assert layer["attn"]["k"]["bias"].sharding.spec == P("tensor")
assert layer["attn"]["o"]["weight"].sharding.spec == P("fsdp", "tensor")
assert layer["attn"]["o"]["bias"].sharding.is_fully_replicated
assert layer["norm1"]["scale"].sharding.is_fully_replicated
down = layer["mlp"]["down"]["weight"]
assert down.addressable_shards[0].data.shape == (2, 5)
np.testing.assert_array_equal(down, params["layers_0"]["mlp"]["down"]["weight"])
print("all laws hold")
"""


def test_eight_devices_give_the_numbers_of_one(on_devices):
    assert on_devices(ON_EIGHT, count=8).endswith("all laws hold\n")


def test_without_a_mesh_every_helper_is_the_identity():
    def fn(x):
        return x + 1

    x = jnp.arange(6.0).reshape(2, 3)
    assert sharding.shard(x, "batch", "embed") is x
    assert sharding.param_sharding("layers_0/mlp/up/weight", (4, 4)) is None
    run = sharding.local(fn, [("batch", None)], ("batch", None))
    np.testing.assert_array_equal(run(x), x + 1)


def test_a_mesh_that_does_not_fit_is_refused():
    count = len(jax.devices())
    with pytest.raises(LclmError, match=f"does not fit {count} devices"):
        sharding.make_mesh(data=count + 1)
    with pytest.raises(LclmError, match="at most one of them is -1"):
        sharding.make_mesh(data=-1, fsdp=-1)
    with pytest.raises(LclmError, match="did you mean 'tensor'"):
        sharding.make_mesh(tensr=1)
    with pytest.raises(LclmError, match="tensor=0: give at least 1"):
        sharding.make_mesh(tensor=0)


def test_one_mesh_axis_is_never_used_twice():
    with (
        jax.set_mesh(sharding.make_mesh(jax.devices()[:1])),
        pytest.raises(ValueError, match="use one mesh axis twice"),
    ):
        sharding.shard(jnp.zeros((2, 2)), "heads", "ffn")


def test_an_unknown_logical_axis_names_the_nearest():
    with (
        jax.set_mesh(sharding.make_mesh(jax.devices()[:1])),
        pytest.raises(LclmError, match="did you mean 'batch'"),
    ):
        sharding.shard(jnp.zeros(2), "bach")
