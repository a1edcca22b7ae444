"""Dense attention by kernels of others: cuDNN, JAX's splash for TPUs, tokamax.

They see everything or what is behind and give what every implementation gives: the
output, the float32 log-sum-exp and gradients through both. The gradients of cuDNN and
splash know no cotangent of the log-sum-exp, so where there is one (parts that were
merged), and for splash always, gradients are those of our own kernels, which need the
two results alone. tokamax returns no log-sum-exp: it is XLA's, and costs nothing in a
program where nobody reads it.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import dispatch
from pallas_kernels.attention import vjp
from pallas_kernels.attention.spec import Spec, wide
from pallas_kernels.mask import Causal, Full

LANES = 128
LONGEST = 32_768  # splash: its mask is made on the host, in time that grows with blocks
NAMES = ("attention_out", "attention_lse")


def refuses(call: dispatch.Call) -> str | None:
    """Why none of these libraries would take a call, or None."""
    if not isinstance(call.spec.mask, (Full, Causal)):
        return f"its mask is neither full nor causal but {call.spec.mask}"
    (_, T, _, H), S = call.q_shape, call.kv_shape[1]
    if _causal(call.spec) and (T != S or call.spec.offset):
        return f"{T} queries from {call.spec.offset} on are not its {S} keys"
    if call.dtype != call.kv_dtype or call.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtypes {call.dtype}, {call.kv_dtype} are not one of 16 bits"
    if call.v_shape[3] != H:
        return f"head widths {H} and {call.v_shape[3]} differ"
    if call.sink or call.segments:
        return "it has a learned sink or segments"
    if 0 in (*call.q_shape, *call.kv_shape):
        return f"q {call.q_shape} or k {call.kv_shape} is empty"
    return None


def _causal(spec: Spec) -> bool:
    return isinstance(spec.mask, Causal)


def backward(spec: Spec, saved, cotangents):
    """Gradients of q, k, v and sink from both results, by a kernel of ours."""
    q, k, v = saved[:3]
    call = dispatch.Call(
        spec, q.shape, k.shape, v.shape, q.dtype, k.dtype, dispatch.platform()
    )
    return dispatch.select(call, None, own=True).load_backward()(
        spec, saved, cotangents
    )


# cuDNN


def refuses_cudnn(call: dispatch.Call) -> str | None:
    """Why cuDNN would not take a call, or None; it needs a cuDNN that is installed."""
    reason = refuses(call)
    if reason is not None:
        return reason
    if call.spec.softcap is not None:
        return "it has a soft cap"
    try:
        fused = _fused()
        fused.check_cudnn_version()
    except (ImportError, RuntimeError) as error:
        return f"no cuDNN ({error})"
    most = 256 if fused.check_compute_capability("9.0") else 128
    if call.q_shape[3] % 8 or call.q_shape[3] > most:
        return f"head width {call.q_shape[3]} is not a multiple of 8 up to {most}"
    return None


def _fused():
    """JAX's binding of cuDNN: the public one rounds the log-sum-exp to 16 bits.

    ImportError where this JAX has another one.
    """
    from jax._src.cudnn import fused_attention_stablehlo as found

    if not hasattr(found, "_dot_product_attention_bwd_rule"):
        raise ImportError("this JAX binds cuDNN in another way")
    return found


def _kind(spec: Spec):
    kinds = _fused().MaskType
    return kinds.CAUSAL if _causal(spec) else kinds.NO_MASK


def _cudnn_forward(spec: Spec, q, k, v):
    return _fused().dot_product_attention(
        q, k, v, scale=spec.scale, mask_type=_kind(spec), return_residual=True
    )


def _cudnn_backward(spec: Spec, saved, d_out):
    """Gradients by the rule behind the binding: it alone takes what was kept."""
    q, k, v, out, lse = saved
    fused, no = _fused(), jnp.zeros(0, q.dtype)
    layout, seed, dropout, biases = fused.AttentionLayout.BTNH.value, 42, 0.0, (0, 0)
    version, residual = fused.check_cudnn_version(), False
    return fused._dot_product_attention_bwd_rule(
        spec.scale, seed, dropout, biases, _kind(spec), layout, None, version, residual,
        (q, k, v, no, no, no, no, no, no, no, lse, out), d_out,
    )[:3]  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cudnn(spec: Spec, q, k, v):
    return _cudnn_forward(spec, q, k, v)


def _cudnn_save(spec: Spec, *given):
    q, k, v = (x.value for x in given)
    out, lse = map(checkpoint_name, _cudnn_forward(spec, q, k, v), NAMES)
    return (out, lse), (q, k, v, out, lse)


def _cudnn_apply(spec: Spec, saved, cotangents):
    q, k, v, out, lse = saved
    d_out, d_lse = cotangents
    if isinstance(d_lse, SymbolicZero):
        return _cudnn_backward(spec, saved, _filled(d_out))
    kept = (q, k, v, None, None, None, out, lse)
    return backward(spec, kept, (_filled(d_out), d_lse))[:3]


def _filled(cotangent):
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


_cudnn.defvjp(_cudnn_save, _cudnn_apply, symbolic_zeros=True)


def cudnn(spec: Spec, q, k, v, sink, q_segment_ids, kv_segment_ids):
    """cuDNN's output [B, T, N, H] and float32 log-sum-exp [B, N, T]."""
    return _cudnn(spec, q, k, v)


# Splash


def refuses_splash(call: dispatch.Call) -> str | None:
    """Why splash would not take a call, or None."""
    reason = refuses(call)
    if reason is not None:
        return reason
    T, S = call.q_shape[1], call.kv_shape[1]
    if T % LANES or S % LANES or max(T, S) > LONGEST:
        return f"{T} x {S} tokens are not multiples of {LANES} up to {LONGEST}"
    if call.q_shape[3] % LANES:
        return f"head width {call.q_shape[3]} is not a multiple of {LANES}"
    return dispatch.outside_shard_map()


@functools.lru_cache(maxsize=16)
def _splash(T: int, S: int, heads: int, causal: bool, softcap: float | None):
    from jax.experimental.pallas.ops.tpu import splash_attention as package

    one = (package.CausalMask if causal else package.FullMask)((T, S))
    rows, keys = (
        max(b for b in (128, 256, 512, 1024) if b <= most and n % b == 0)
        for n, most in ((T, 512), (S, 1024))
    )
    with jax.ensure_compile_time_eval():
        return package.make_splash_mha(
            package.MultiHeadMask([one] * heads),
            block_sizes=package.BlockSizes(rows, keys, min(keys, 512)),
            head_shards=1, q_seq_shards=1, save_residuals=True,
            attn_logits_soft_cap=softcap,
        )  # fmt: skip


def splash_forward(spec: Spec, q, k, v, sink, q_segment_ids, kv_segment_ids):
    """Splash's output [B, T, N, H] and float32 log-sum-exp [B, N, T].

    It has no scale: queries are scaled before they are given to it, and rounded.
    """
    (B, T, N, _), S = q.shape, k.shape[1]
    run = _splash(T, S, B * N, _causal(spec), spec.softcap)

    def heads(x):  # a row's heads after another's: all have one mask
        return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])

    out, (lse,) = run(*map(heads, ((wide(q) * spec.scale).astype(q.dtype), k, v)))
    return out.reshape(B, N, T, -1).swapaxes(1, 2), lse.reshape(B, N, T)


splash = vjp.operation(splash_forward, backward)


# tokamax


def refuses_tokamax(call: dispatch.Call) -> str | None:
    """Why tokamax would not take a call, or None; nobody takes it but by its name."""
    if importlib.util.find_spec("tokamax") is None:
        return "it is not installed"
    return refuses(call)


def tokamax(spec: Spec, q, k, v, sink, q_segment_ids, kv_segment_ids):
    """tokamax's output [B, T, N, H] and XLA's float32 log-sum-exp [B, N, T]."""
    out = importlib.import_module("tokamax").dot_product_attention(
        q, k, v, scale=spec.scale, is_causal=_causal(spec), logits_soft_cap=spec.softcap
    )
    return out, vjp.attend(spec, q, k, v, None, None, None)[1]
