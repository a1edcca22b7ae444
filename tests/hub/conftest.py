"""Small files of every kind that the hub reads, built in a temporary folder."""

import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
# Models that differ from another golden one in an option alone.
VARIANTS = (
    "llama_bias llama_head16 llama_rope_linear llama_rope_yarn llama_tied "
    "mamba2_groups mamba2_limit mamba_bias megalodon_plain mistral"
).split()
MODELS = [
    pytest.param(path.name, marks=[pytest.mark.slow] * (path.name in VARIANTS))
    for path in sorted(GOLDEN.iterdir())
    if (path / "config.json").is_file()
]
HEADS, HEAD_DIM, WIDTH, HIDDEN, VOCAB = 2, 8, 32, 64, 64


@pytest.fixture
def hf_folder(tmp_path):
    """A writable copy of a golden model."""

    def copy(name="llama"):
        target = tmp_path / name
        shutil.copytree(GOLDEN / name, target)
        return target

    return copy


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k, written independently of the reader."""
    rows = np.empty_like(weight)
    size = len(weight) // heads
    for h in range(heads):
        for j in range(size // 2):
            rows[h * size + 2 * j] = weight[h * size + j]
            rows[h * size + 2 * j + 1] = weight[h * size + size // 2 + j]
    return rows


def plain_weights(arch: str, layers: int = 2) -> dict[str, np.ndarray]:
    """Random float32 tensors under their GGUF names, norms and all."""
    rng = np.random.default_rng(7)
    width = HEADS * HEAD_DIM

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    found = {"token_embd.weight": draw(VOCAB, WIDTH), "output_norm.weight": draw(WIDTH)}
    for i in range(layers):
        part = {
            "attn_norm.weight": draw(WIDTH),
            "ffn_norm.weight": draw(WIDTH),
            "attn_q.weight": draw(width, WIDTH),
            "attn_k.weight": draw(width // 2, WIDTH),
            "attn_v.weight": draw(width // 2, WIDTH),
            "attn_output.weight": draw(WIDTH, width * WIDTH // WIDTH),
            "ffn_gate.weight": draw(HIDDEN, WIDTH),
            "ffn_up.weight": draw(HIDDEN, WIDTH),
            "ffn_down.weight": draw(WIDTH, HIDDEN),
        }
        if arch == "qwen2":
            part |= {
                f"attn_{n}.bias": draw(width if n == "q" else width // 2) for n in "qkv"
            }
        if arch in ("qwen3", "gemma3"):
            part["attn_q_norm.weight"] = draw(HEAD_DIM)
            part["attn_k_norm.weight"] = draw(HEAD_DIM)
        if arch == "gemma3":
            part["post_attention_norm.weight"] = draw(WIDTH)
            part["post_ffw_norm.weight"] = draw(WIDTH)
        found |= {f"blk.{i}.{k}": v for k, v in part.items()}
    return found


def write_gguf(
    path: Path,
    arch: str = "llama",
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    weights: dict[str, np.ndarray] | None = None,
    vocabulary=None,
) -> dict[str, np.ndarray]:
    """Write a tiny model with the `gguf` package's own writer; gives its tensors."""
    weights = plain_weights(arch) if weights is None else weights
    writer = gguf.GGUFWriter(path, arch)
    layers = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blk."))
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    if arch == "gemma3":
        writer.add_sliding_window(5)
    if vocabulary:
        vocabulary(writer)
    for name, value in weights.items():
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if value.ndim == 2 and block > 1 and value.shape[-1] % block == 0:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def text(value: str | bytes) -> bytes:
    """A GGUF string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def header(tensors: int, keys: int, *, magic: bytes = b"GGUF", version: int = 3):
    """The fixed start of a GGUF file."""
    return magic + struct.pack("<IQQ", version, tensors, keys)
