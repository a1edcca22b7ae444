"""Laws every attention pattern keeps, over every entry of the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.attention import PATTERNS, make
from lclm.errors import LclmError
from pallas_kernels.attention import attention

LENGTH, HEADS = 64, 4
SMALL = {
    "window": "window=10",
    "sink_window": "sinks=3,window=10",
    "chunk": "chunk=16",
    "shifted_groups": "group=16",
    "block_sparse": "block=8,local=2,stride=3,kv_heads=2",
}


def small(name: str):
    return make(f"{name}:{SMALL.get(name, '')}")


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_causal_has_no_empty_row_and_is_hashable(name):
    seen = np.asarray(small(name).array(LENGTH, LENGTH, heads=HEADS))
    assert not np.triu(seen, 1).any()
    assert seen.any(-1).all()
    assert hash(small(name)) == hash(small(name))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_block_map_is_tight(name):
    mask, b = small(name), 8
    seen = np.asarray(mask.array(LENGTH, LENGTH, heads=HEADS))
    blocks = seen.reshape(-1, LENGTH // b, b, LENGTH // b, b).sum((2, 4))
    want = np.where(blocks == 0, 0, np.where(blocks == b * b, 2, 1))
    got = np.asarray(mask.summary(LENGTH, LENGTH, b, b, heads=HEADS))
    np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_blocked_form_equals_the_oracle_in_value_and_gradient(name):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (1, LENGTH, HEADS, 8))
    k, v = (jax.random.normal(key, (1, LENGTH, 2, 8)) for key in keys[1:3])
    weight = jax.random.normal(keys[3], q.shape)

    def loss(q, k, v, implementation):
        out, _ = attention(q, k, v, mask=small(name), implementation=implementation)
        return jnp.sum(out * weight)

    run = jax.value_and_grad(loss, (0, 1, 2))
    (a, da), (b, db) = (run(q, k, v, i) for i in ("reference", "xla"))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for x, y in zip(da, db, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("windw", "did you mean 'window'"),
        ("window:window=0", "window"),
        ("window:size=3", "no option 'size'"),
        (3, "attention pattern 3"),
    ],
)
def test_a_bad_pattern_is_one_clear_error(pattern, says):
    with pytest.raises(LclmError, match=says):
        make(pattern)
