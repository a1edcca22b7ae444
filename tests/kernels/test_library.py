"""Laws of the libraries' kernels behind the dispatch: they give what ours give.

Splash runs in the TPU interpreter. Of cuDNN, which needs a GPU, the binding's forward
and backward are replaced by dense attention in the layout it documents; `make kernels`
compiles the real one for an H200.
"""

import dataclasses
import functools
import importlib.machinery
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels import mask as M
from pallas_kernels.attention import attention, library

LENGTH = 256


def inputs(T=LENGTH, S=LENGTH, N=4, K=2, H=128, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    shapes = (2, T, N, H), (2, S, K, H), (2, S, K, H), (2, T, N, H), (2, N, T)
    q, k, v, d_out, d_lse = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes
    )
    return tuple(x.astype(dtype) for x in (q, k, v)), (d_out, d_lse)


def both(implementation, mask, weigh_lse, given, **options):
    """Results and gradients of a loss over the output, and the lse where asked."""
    args, (d_out, d_lse) = given

    def loss(q, k, v):
        out, lse = attention(
            q, k, v, mask=mask, implementation=implementation, **options
        )
        total = jnp.sum(out.astype(jnp.float32) * d_out)
        return total + weigh_lse * jnp.sum(lse * d_lse) if weigh_lse else total, (
            out,
            lse,
        )

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*args)


def near(got, want, size=0.04):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.abs(a - b).max() <= size * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("mask", [M.causal(), M.full()], ids=["causal", "full"])
@pytest.mark.parametrize("weigh_lse", [0.0, 1.0])
def test_splash_gives_what_the_oracle_gives(mask, weigh_lse):
    given = inputs()
    want = both("reference", mask, weigh_lse, given, softcap=20.0)
    with dispatch.target("tpu"), pltpu.force_tpu_interpret_mode():
        got = both("splash", mask, weigh_lse, given, softcap=20.0)
    near(got, want)
    assert got[0][1][1].dtype == jnp.float32


def dense(q, k, v, *, scale, mask_type, qkv_layout="BTNH", return_residual=False, **_):
    """What cuDNN's binding says it gives."""
    mask = M.causal() if mask_type == library._fused().MaskType.CAUSAL else M.full()
    out, lse = attention(q, k, v, mask=mask, scale=scale, implementation="reference")
    return (out, lse) if return_residual else out


@pytest.fixture
def cudnn(monkeypatch):
    """A cuDNN of dense attention that counts the calls of its gradients."""
    real, called = library._fused(), []

    def back(scale, seed, dropout, variadic, kind, layout, window, version, residual,
             kept, d_out):  # fmt: skip
        assert len(kept) == 12 and kept[10].dtype == jnp.float32
        called.append(kind)
        run = functools.partial(dense, scale=scale, mask_type=kind)
        return *jax.vjp(run, *kept[:3])[1](d_out), *(None,) * 7

    fake = types.SimpleNamespace(
        MaskType=real.MaskType,
        AttentionLayout=real.AttentionLayout,
        check_cudnn_version=lambda: 91000,
        check_compute_capability=real.check_compute_capability,
        dot_product_attention=dense,
        _dot_product_attention_bwd_rule=back,
    )
    monkeypatch.setattr(library, "_fused", lambda: fake)
    return called


@pytest.fixture
def here(monkeypatch):
    """cuDNN is asked on a CPU too, where XLA's form can run beside it."""
    entry = dispatch.IMPLEMENTATIONS["cudnn"]
    anywhere = dataclasses.replace(entry, supports=library.refuses_cudnn)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "cudnn", anywhere)


@pytest.mark.parametrize("mask", [M.causal(), M.full()], ids=["causal", "full"])
def test_cudnn_is_taken_for_dense_attention_and_its_gradients(cudnn, here, mask):
    given = inputs(H=64)
    got = both(None, mask, 0.0, given)
    near(got, both("reference", mask, 0.0, given))
    assert len(cudnn) == 1


def test_layers_that_are_computed_again_keep_cudnns_gradients(cudnn, here):
    (q, k, v), _ = inputs(H=64)

    @jax.checkpoint
    def layer(x, _):
        out, _ = attention(x, k, v, mask=M.causal())
        return x + out, None

    jax.grad(lambda x: jax.lax.scan(layer, x, None, length=2)[0].sum())(q)
    assert len(cudnn) == 1


def test_a_cotangent_of_the_lse_goes_to_gradients_that_take_it(cudnn, here):
    given = inputs(H=64)
    got = both("cudnn", M.causal(), 1.0, given)
    near(got, both("reference", M.causal(), 1.0, given))
    assert not cudnn


def test_a_cudnn_that_is_there_changes_no_kernel_of_ours(cudnn):
    run = functools.partial(_selected, "gpu")
    assert run(M.causal()) == "cudnn"
    assert run(M.causal() & M.window(9)) == "mosaic_gpu"
    assert run(M.causal(), sink=True) == "mosaic_gpu"
    assert run(M.causal(), segments=True) == "mosaic_gpu"
    assert run(M.causal(), offset=3) == "mosaic_gpu"
    assert run(M.causal(), dtype="float32") == "xla"
    assert run(M.causal(), own=True) == "mosaic_gpu"
    assert _selected("tpu", M.causal()) == "mosaic_tpu"
    with dispatch.preferring("splash"):
        assert _selected("tpu", M.causal()) == "splash"
        assert _selected("tpu", M.causal() & M.window(9)) == "mosaic_tpu"


def _selected(platform, mask, dtype="bfloat16", own=False, offset=0, **facts) -> str:
    spec = library.Spec(mask, 1.0, None, offset)
    shape, kind = (1, LENGTH, 2, 128), jnp.dtype(dtype)
    call = dispatch.Call(spec, shape, shape, shape, kind, kind, platform, **facts)
    found = dispatch.select(call, None, own=own)
    return next(n for n, x in dispatch.IMPLEMENTATIONS.items() if x is found)


def test_one_that_is_named_says_what_it_takes():
    (q, k, v), _ = inputs()
    with dispatch.target("tpu"), pytest.raises(ValueError, match="neither full nor"):
        attention(q, k, v, mask=M.window(9), implementation="splash")
    with pytest.raises(ValueError, match="it runs on gpu, and this is cpu"):
        attention(q, k, v, mask=M.causal(), implementation="cudnn")
    with dispatch.target("gpu"), pytest.raises(ValueError, match="no cuDNN"):
        attention(q, k, v, mask=M.causal(), implementation="cudnn")
    with pytest.raises(ValueError, match="tokamax: it is not installed"):
        attention(q, k, v, mask=M.causal(), implementation="tokamax")


def test_tokamax_gives_its_output_and_xlas_lse(monkeypatch):
    """Its public function stands in for it: it is no requirement."""
    fake = types.ModuleType("tokamax")
    fake.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)

    def public(q, k, v, *, scale, is_causal, logits_soft_cap):
        assert is_causal and logits_soft_cap == 20.0
        return attention(
            q, k, v, mask=M.causal(), scale=scale, softcap=logits_soft_cap
        )[0]

    fake.dot_product_attention = public
    monkeypatch.setitem(sys.modules, "tokamax", fake)
    given = inputs(H=64)
    for weigh_lse in (0.0, 1.0):
        got, want = (
            both(name, M.causal(), weigh_lse, given, softcap=20.0)
            for name in ("tokamax", "reference")
        )
        near(got, want)
    assert _selected("cpu", M.causal()) == "xla"
