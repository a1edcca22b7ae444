"""Laws of placement: identity without a mesh, the same numbers with one."""

import jax
import jax.numpy as jnp
import pytest

from lclm import sharding
from lclm.errors import LclmError

ON_EIGHT = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from lclm.sharding import make_mesh, param_spec, place

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
        "mamba": {"in": {"weight": np.zeros((8, 8))}},
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
assert layer["mamba"]["in"]["weight"].sharding.is_fully_replicated
down = layer["mlp"]["down"]["weight"]
assert down.addressable_shards[0].data.shape == (2, 5)
np.testing.assert_array_equal(down, params["layers_0"]["mlp"]["down"]["weight"])

# Training: repeats of a scanned group stay together, unknown matrices are split too.
spec = lambda path, *shape: param_spec(path, shape, mesh)
assert spec("run_0/block_0/attn/q/weight", 4, 6, 8) == P(None, "tensor", "fsdp")
assert spec("run_0/block_0/norm1/scale", 4, 8) == P()
assert spec("run_0/block_0/mamba/in/weight", 4, 16, 8) == P(None, "fsdp", None)
assert spec("layers_0/mamba/conv/weight", 6, 1, 3) == P()
assert spec("layers_0/attn/q/weight/lora_up", 6, 2) == P("tensor", None)
assert spec("layers_0/attn/q/weight/lora_down", 2, 8) == P()
assert spec("layers_0/attn/o/weight/lora_down", 2, 6) == P(None, "tensor")
assert spec("objective/gates", 8, 8) == P()
print("all laws hold")
"""


def test_parameters_lie_where_the_table_says(on_devices):
    assert on_devices(ON_EIGHT, count=8).endswith("all laws hold\n")


def test_without_a_mesh_every_helper_is_the_identity():
    x = jnp.arange(6.0).reshape(2, 3)
    assert sharding.total(x, "data") is x and sharding.largest(x, "data") is x
    assert sharding.gather({"a": x})["a"] is x
    assert sharding.axis_size("data", "tensor") == 1
    assert sharding.axis_index("data") == 0 and not sharding.inside()


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
