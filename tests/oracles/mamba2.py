"""Write (or with --check compare) the Mamba-2 outputs of transformers.

Run like make_goldens.py, by its environment: PyTorch and `transformers` are the oracle.

    python tests/oracles/mamba2.py [--check] [names ...]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from make_goldens import make
from transformers import Mamba2Config, Mamba2ForCausalLM

LENGTH = 17
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 8,
    "chunk_size": 4,
    "num_hidden_layers": 2,
}
CASES = {
    "mamba2": Mamba2Config(**TINY, n_groups=1, tie_word_embeddings=True),
    "mamba2_groups": Mamba2Config(**TINY, n_groups=2, use_bias=True),
    "mamba2_limit": Mamba2Config(**TINY, n_groups=2, time_step_limit=(0.1, 0.6)),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Far from tame: matrices 0.6 N / sqrt(fan in), norms 1 + 0.2 N, a_log 0.5 N."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("A_log"):
                noise = 0.5 * noise
            elif name.endswith("dt_bias"):
                noise = noise - 1
            elif name.endswith(".bias"):
                noise = 0.3 * noise
            elif value.ndim > 1:
                noise = 0.6 * noise / value.shape[-1] ** 0.5
            elif not name.endswith(".D"):
                noise = 1 + 0.2 * noise
            value.copy_(noise)


def write(name: str, folder: Path) -> None:
    """One random model, tokens, their logits and the gradient of two parameters."""
    seed = 2000 + sorted(CASES).index(name)
    model = Mamba2ForCausalLM(CASES[name]).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(seed).integers(0, 64, (2, LENGTH))
    out = model(torch.from_numpy(tokens), labels=torch.from_numpy(tokens))
    out.loss.backward()
    mixer = model.backbone.layers[0].mixer
    np.savez(
        folder / "golden.npz",
        tokens=tokens.astype(np.int32),
        logits=out.logits.detach().float().numpy(),
        loss=np.float32(out.loss.item()),
        grad_a_log=mixer.A_log.grad.numpy(),
        grad_dt_bias=mixer.dt_bias.grad.numpy(),
        grad_conv=mixer.conv1d.weight.grad.numpy(),
    )


if __name__ == "__main__":
    sys.exit(make(__doc__, CASES, write))
