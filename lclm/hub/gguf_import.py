"""GGUF in: metadata to `ModelConfig`, tensors to our tree, one at a time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
    find_runs,
)
from lclm.errors import LclmError, unknown
from lclm.hub.bundle import Bundle, check_shapes
from lclm.hub.families import GGUF, GgufFamily
from lclm.hub.gguf_file import GgufFile
from lclm.hub.gguf_quants import PACKABLE, pack
from lclm.hub.gguf_vocab import gguf_tokenizer
from lclm.hub.names import gguf_names, param_shapes
from lclm.ops.rope import frequencies
from lclm.specs import MoeSpec
from lclm.tree import nest

FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}
PACKED = {"int8": 8, "int4": 4}
_ROPE_FACTORS = "rope_freqs.weight"
_IGNORED = (_ROPE_FACTORS,)
_GEMMA3_PERIOD = 6  # every 6th layer sees everything (arXiv 2503.19786, section 2)


class GgufKeys:
    """Metadata below one architecture's prefix, with types checked."""

    def __init__(self, file: GgufFile, arch: str):
        self.file, self.arch = file, arch

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._get(name, int, default)
        if value is None:
            raise self._missing(name)
        if value < 1:
            raise LclmError(f"{self.file.path}: {self.arch}.{name} is {value}; >= 1")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self._get(name, (float, int), default)
        if value is None:
            raise self._missing(name)
        return float(str(np.float32(value)))  # stored as float32: 1e-05, not 9.99e-06

    def maybe(self, name: str, kind: type) -> Any:
        return self._get(name, kind, None)

    def depth(self) -> int:
        """Layers, no more than the file has tensors."""
        count = self.whole("block_count")
        if count > len(self.file.tensors):
            raise LclmError(
                f"{self.file.path}: {self.arch}.block_count is {count} but the file "
                f"holds {len(self.file.tensors)} tensors"
            )
        return count

    def _get(self, name: str, kind: Any, default: Any) -> Any:
        return self.file.get(f"{self.arch}.{name}", kind, default)

    def _missing(self, name: str) -> LclmError:
        return LclmError(
            f"{self.file.path}: no key {self.arch}.{name}, which a model needs"
        )


def load_gguf(
    path: str | Path, *, dtype: Any = None, packed: str | None = None
) -> Bundle:
    """Read a GGUF model file; weights become `dtype`, float32 where None.

    `packed="int8"` or `"int4"` keeps matrices of block types (Q4_0 to Q8_0) as
    `PackedWeight`, value for value; "int4" leaves types of more than 4 bits at 8. Other
    types are dequantised. Raises `LclmError` before any weight is read.
    """
    if packed is not None and packed not in PACKED:
        raise unknown("weight packing", packed, PACKED)
    file = GgufFile(path)
    config = gguf_config(file)
    names = gguf_names(config)
    family = GGUF[config.family] if config.family in GGUF.entries else GgufFamily()
    shapes = param_shapes(config)
    check_shapes(
        {n: t.shape for n, t in file.tensors.items() if n not in _IGNORED},
        {names[p]: family.shape(p, s, config) for p, s in shapes.items()},
        str(path),
    )
    bits = PACKED.get(packed) if packed else None
    target = np.dtype(jnp.dtype(dtype or jnp.float32))

    def read(p: str) -> Any:
        value = _read(file, config, p, names[p], bits=bits)
        if not isinstance(value, np.ndarray):
            return value
        value = family.values(p, value).reshape(shapes[p])
        return jnp.asarray(value.astype(target, copy=False))

    with ThreadPoolExecutor() as pool:
        params = nest(dict(zip(names, pool.map(read, names), strict=True)))
    return Bundle(config, params, gguf_tokenizer(file), str(path), Path(path))


def _read(
    file: GgufFile, config: ModelConfig, path: str, name: str, *, bits: int | None
) -> Any:
    tensor = file.tensors[name]
    rows = _row_order(config, path)
    if bits and tensor.kind in PACKABLE and len(tensor.shape) == 2:
        weight = pack(file.raw(name), tensor.kind, bits=bits)
        return weight if rows is None else weight.gather(jnp.asarray(rows))
    values = file.read(name)
    if rows is not None:
        values = values[rows]
    if path.endswith("scale") and _norm_offset(config, path):
        values = values - np.float32(_norm_offset(config, path))
    return values


def _row_order(config: ModelConfig, path: str) -> np.ndarray | None:
    """Undo llama.cpp's interleaving of q and k rows (architecture llama only).

    Per head, stored row 2j is our row j and 2j + 1 is j + H / 2.
    """
    parts = path.split("/")
    if (
        config.family not in ("llama", "mixtral")
        or len(parts) < 3
        or parts[2] not in "qk"
    ):
        return None
    mixer = config.layers[int(parts[0].removeprefix("layers_"))].mixer
    heads = mixer.heads if parts[2] == "q" else mixer.kv_heads
    stored = np.arange(heads * mixer.head_dim)
    return stored.reshape(heads, mixer.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _norm_offset(config: ModelConfig, path: str) -> float:
    return config.norm.offset if "norm" in path else 0.0


def gguf_config(file: GgufFile) -> ModelConfig:
    """The model that a file's metadata describes.

    Raises `LclmError` for another architecture or a key missing or out of range.
    """
    arch = file.get("general.architecture", str)
    if arch not in FAMILIES and arch not in GGUF.entries:
        raise unknown("GGUF architecture", arch, [*FAMILIES, *GGUF])
    if "token_embd.weight" not in file.tensors:
        raise LclmError(f"{file.path}: no tensor token_embd.weight; not a model file")
    if arch in GGUF.entries:
        return GGUF[arch].config(file)
    keys = GgufKeys(file, arch)
    gemma = arch == "gemma3"
    norm = NormSpec(
        keys.real("attention.layer_norm_rms_epsilon", 1e-6), 1.0 if gemma else 0.0
    )
    width = keys.whole("embedding_length")
    layers = tuple(_layer(file, keys, norm, i) for i in range(keys.depth()))
    bos, eos = special_tokens(file)
    return ModelConfig(
        family="mixtral" if keys.maybe("expert_count", int) else FAMILIES[arch],
        vocab=file.tensors["token_embd.weight"].shape[0],
        width=width,
        stack=find_runs(layers),
        context=keys.whole("context_length"),
        norm=norm,
        tied="output.weight" not in file.tensors,
        embed_scale=width**0.5 if gemma else None,
        final_softcap=keys.maybe("final_logit_softcapping", float),
        bos=bos,
        eos=eos,
    )


def special_tokens(file: GgufFile) -> tuple[int | None, tuple[int, ...]]:
    """The token a text starts with, and those that end it."""
    bos, *ends = (
        file.get(f"tokenizer.ggml.{n}", int)
        for n in ("bos_token_id", "eos_token_id", "eot_token_id")
    )
    return bos, tuple(dict.fromkeys(e for e in ends if e is not None))


def _layer(file: GgufFile, keys: GgufKeys, norm: NormSpec, index: int) -> LayerSpec:
    heads = keys.whole("attention.head_count")
    head_dim = keys.maybe("attention.key_length", int)
    head_dim = head_dim or keys.whole("embedding_length") // heads
    if keys.maybe("attention.value_length", int) not in (None, head_dim):
        raise LclmError(f"{file.path}: key and value heads of unlike width")
    gemma, window = keys.arch == "gemma3", keys.maybe("attention.sliding_window", int)
    whole = gemma and (index + 1) % _GEMMA3_PERIOD == 0
    mixer = AttentionSpec(
        heads=heads,
        kv_heads=keys.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope=_rope(file, keys, head_dim, local=gemma and not whole),
        window=None if whole or not window else window,
        scale=_gemma_scale(keys, heads) if gemma else None,
        qkv_bias=keys.arch == "qwen2" or f"blk.{index}.attn_q.bias" in file.tensors,
        out_bias=f"blk.{index}.attn_output.bias" in file.tensors,
        qk_norm=keys.arch in ("qwen3", "gemma3"),
    )
    if keys.maybe("expert_count", int):
        return LayerSpec(mixer, _experts(keys), norm)
    mlp = MlpSpec(
        keys.whole("feed_forward_length"),
        "gelu_tanh" if gemma else "silu",
        f"blk.{index}.ffn_down.bias" in file.tensors,
    )
    return LayerSpec(mixer, mlp, norm, post_norms=gemma)


def _experts(keys: GgufKeys) -> MoeSpec:
    """Mixtral's feed-forward, which llama.cpp files under architecture llama."""
    if keys.arch != "llama":
        raise LclmError(
            f"{keys.file.path}: {keys.arch}.expert_count is set, but experts are read "
            "in architectures llama (Mixtral) and jamba only"
        )
    return MoeSpec(
        keys.whole("feed_forward_length"),
        keys.whole("expert_count"),
        keys.whole("expert_used_count"),
        renormalise=True,
    )


def _gemma_scale(keys: GgufKeys, heads: int) -> float | None:
    """Gemma-3 27B (62 layers) scales by D / N; the others by the head width."""
    if keys.whole("block_count") != 62:
        return None
    return (keys.whole("embedding_length") / heads) ** -0.5


def _rope(file: GgufFile, keys: GgufKeys, head_dim: int, *, local: bool) -> RopeSpec:
    context = keys.whole("context_length")
    if local:
        theta = keys.real("rope.freq_base_swa", 10000.0)
        return RopeSpec(theta=theta, context=context)
    base: dict[str, Any] = {
        "theta": keys.real("rope.freq_base", 1e6 if keys.arch == "gemma3" else 1e4),
        "context": context,
        "partial": keys.whole("rope.dimension_count", head_dim) / head_dim,
    }
    if _ROPE_FACTORS in file.tensors:
        return _factors(file.read(_ROPE_FACTORS), base, head_dim)
    kind = keys.maybe("rope.scaling.type", str)
    if kind in (None, "none"):
        return RopeSpec(**base)
    base["factor"] = keys.real("rope.scaling.factor")
    base["original"] = keys.maybe("rope.scaling.original_context_length", int)
    if kind not in ("linear", "yarn"):
        raise unknown("GGUF RoPE scaling", kind, ("none", "linear", "yarn"))
    return RopeSpec(kind, **base)


def _factors(factors: np.ndarray, base: dict[str, Any], head_dim: int) -> RopeSpec:
    """Per-frequency divisors: Llama-3's rule where they follow it, else longrope's."""
    spec = RopeSpec(
        "llama3",
        factor=float(factors.max()),
        original=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        **base,
    )
    plain, _ = frequencies(RopeSpec(**base), head_dim)
    scaled, _ = frequencies(spec, head_dim)
    if factors.shape == plain.shape and np.allclose(plain / scaled, factors, rtol=1e-3):
        return spec
    listed = tuple(float(f) for f in factors)
    return RopeSpec(
        "longrope",
        attention_factor=1.0,
        short_factor=listed,
        long_factor=listed,
        **base,
    )
