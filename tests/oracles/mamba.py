"""Mamba-1 reference outputs of transformers, as `make_goldens.py` keeps them.

    python tests/oracles/mamba.py [--check] [names ...]

`mamba` is what `save_pretrained` writes with one-shot logits, the final states and
the gradients of a loss by tensor name; `mamba_bias` has projection biases, an output
matrix of its own and another convolution width.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from make_goldens import make
from transformers import MambaConfig, MambaForCausalLM

LENGTH = 40
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 2,
    "time_step_rank": 4,
    "conv_kernel": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES = {
    "mamba": MambaConfig(**TINY),
    "mamba_bias": MambaConfig(
        **TINY | {"conv_kernel": 3, "time_step_rank": "auto"},
        use_bias=True,
        tie_word_embeddings=False,
        residual_in_fp32=False,
    ),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that use the state: a lost one then shows in the first digit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("A_log"):
                noise = 0.5 * noise
            elif name.endswith("dt_proj.bias"):
                noise = noise - 1
            elif name.endswith("bias"):
                noise = 0.3 * noise
            elif name.endswith("norm.weight") or name.endswith("norm_f.weight"):
                noise = 1 + 0.2 * noise
            elif value.ndim > 1:
                noise = 0.6 * noise / value.shape[-1] ** 0.5
            value.copy_(noise)


def write(name: str, folder: Path) -> None:
    """One random model as it is saved, and what it computes."""
    seed = 3000 + sorted(CASES).index(name)
    model = MambaForCausalLM._from_config(CASES[name], dtype=torch.float32).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(seed).integers(0, 64, (2, LENGTH))
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        out = model(ids, use_cache=True)
    states = {
        f"{kind}_{i}": getattr(out.cache_params, f"get_{kind}_state")(i, state_idx=0)
        for i in range(CASES[name].num_hidden_layers)
        for kind in ("conv", "recurrent")
    }
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {f"grad {n}": p.grad for n, p in model.named_parameters()}
    np.savez(
        folder / "golden.npz",
        tokens=tokens.astype(np.int32),
        logits=out.logits.float().numpy(),
        loss=loss.detach().numpy(),
        **{k: v.numpy() for k, v in (states | gradients).items()},
    )


if __name__ == "__main__":
    sys.exit(make(__doc__, CASES, write))
