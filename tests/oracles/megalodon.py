"""Write (or with --check compare) what `megalodon-jax` 0.2.2 computes on tiny models.

Run by an environment of its own, which needs only `pip install megalodon-jax==0.2.2`
(it wants an older jax than the package). Weights get the released names.

    python tests/oracles/megalodon.py [--check] [names ...]
"""

import argparse
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from megalodon_jax import MegalodonConfig, MegalodonForCausalLM
from safetensors.numpy import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LENGTH = 21
TINY = {
    "vocab_size": 64,
    "model_dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "z_dim": 16,
    "value_dim": 48,
    "ffn_hidden_dim": 40,
    "cema_ndim": 4,
    "chunk_size": 8,
    "norm_num_groups": 4,
}
CASES = {
    "megalodon": TINY | {"swiglu": True, "rescale_nffn": True, "scale_emb": True},
    "megalodon_plain": TINY | {"num_heads": 1, "share_emb": True, "rope_base": 1e5},
}
SLOPES = ("alpha", "delta", "theta", "gamma", "omega", "timenorm", "beta", "final_norm")


def leaves(model) -> dict:
    """Released name -> where it is in the model."""
    found = {"embed.weight": lambda m: m.model.embed.weight}
    for i, layer in enumerate(model.model.layers):

        def put(name: str, get, i=i) -> None:
            found[f"layers.{i}.{name}"] = lambda m: get(m.model.layers[i])

        for kind in ("weight", "bias"):
            put(f"mega.timenorm.{kind}", lambda a, k=kind: getattr(a.attn.timenorm, k))
            put(f"nffn.norm.{kind}", lambda a, k=kind: getattr(a.ffn.norm, k))
        for kind in ("alpha", "delta", "theta", "gamma_real", "gamma_imag", "omega"):
            put(f"mega.cema.{kind}", lambda a, k=kind: getattr(a.attn.cema, k))
        put("mega.rmsnorm.weight", lambda a: a.attn.rmsnorm.gamma)
        for kind in ("wz", "wv", "wr", "wh1", "wh2"):
            put(f"mega.{kind}.weight", lambda a, k=kind: getattr(a.attn, k).weight)
            if getattr(layer.attn, kind).bias is not None:
                put(f"mega.{kind}.bias", lambda a, k=kind: getattr(a.attn, k).bias)
        for kind in ("gamma", "beta"):
            put(f"mega.{kind}", lambda a, k=kind: getattr(a.attn, k))
        for kind in ("fc1", "fc2", "fc3"):
            if getattr(layer.ffn, kind) is not None:
                put(f"nffn.{kind}.weight", lambda a, k=kind: getattr(a.ffn, k).weight)
        if layer.ffn.alpha is not None:
            put("nffn.alpha", lambda a: a.ffn.alpha)
    for kind in ("weight", "bias"):
        found[f"output.final_norm.{kind}"] = lambda m, k=kind: getattr(m.model.norm, k)
    if not model.tied:
        found["output.output.weight"] = lambda m: m.lm_head.weight
    return found


def randomise(model, seed: int):
    """Matrices N(0, 0.6 / sqrt(fan in)), all else moved by 0.3 N."""
    rng = np.random.default_rng(seed)
    for name, get in sorted(leaves(model).items()):
        old = np.asarray(get(model))
        noise = rng.normal(size=old.shape).astype(np.float32)
        matrix = old.ndim == 2 and name.endswith("weight")
        new = noise * 0.6 / np.sqrt(old.shape[-1]) if matrix else old + 0.3 * noise
        model = eqx.tree_at(get, model, jnp.asarray(new))
    return model


def released(values: dict) -> dict:
    """gamma_real and gamma_imag as the pair they are stored as; omega [D, 1]."""
    out = {}
    for name, value in values.items():
        value = np.asarray(value)
        if name.endswith("gamma_imag"):
            continue
        if name.endswith("gamma_real"):
            other = np.asarray(values[name.replace("real", "imag")])
            name, value = name.removesuffix("_real"), np.stack([value, other], -1)
        out[name] = value[:, None] if name.endswith("omega") else value
    return out


def compute(options: dict) -> tuple[dict, dict]:
    """Weights, and what the model makes of one text as it is and packed."""
    model = MegalodonForCausalLM(MegalodonConfig(**options), key=jax.random.key(0))
    model = randomise(model, 1)
    tokens = np.random.default_rng(2).integers(0, options["vocab_size"], (2, LENGTH))
    ids = np.zeros((2, LENGTH), np.int32)
    ids[0, :9], ids[0, 9:], ids[1, :3], ids[1, 3:19] = 1, 2, 1, 2
    tokens, ids = jnp.asarray(tokens), jnp.asarray(ids)

    def loss(model):
        logits = model(tokens, segment_ids=ids)[0]
        return jnp.sum(jnp.where((ids > 0)[..., None], jnp.sin(logits), 0)), logits

    slope, packed = eqx.filter_grad(loss, has_aux=True)(model)
    slopes = released({n: get(slope) for n, get in leaves(model).items()})
    outputs = {
        f"slope.{n}": v for n, v in slopes.items() if any(s in n for s in SLOPES)
    }
    outputs |= {"tokens": tokens, "segments": ids, "packed": packed}
    outputs["logits"] = model(tokens)[0]
    weights = released({n: get(model) for n, get in leaves(model).items()})
    return weights, {k: np.asarray(v) for k, v in outputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*", default=[])
    args = parser.parse_args()
    for name in args.names or CASES:
        weights, outputs = compute(CASES[name])
        folder = GOLDEN / name
        if args.check:
            stored = np.load(folder / "golden.npz")
            for key, value in outputs.items():
                size = max(1.0, np.abs(value).max())
                np.testing.assert_allclose(stored[key], value, atol=1e-5 * size)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {k: np.ascontiguousarray(v) for k, v in weights.items()},
                folder / "model.safetensors",
            )
            table = {"model_type": "megalodon"} | CASES[name]
            (folder / "config.json").write_text(json.dumps(table, indent=2) + "\n")
            np.savez_compressed(folder / "golden.npz", **outputs)
        print(f"{name}: {'checked' if args.check else 'written'}")


if __name__ == "__main__":
    main()
