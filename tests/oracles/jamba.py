"""Write (or with --check compare) tiny Jamba and Mixtral models of transformers.

    python tests/oracles/jamba.py [--check] [names ...]

Beside the logits a golden holds the load-balance loss with and without padding, and
the gradient of the next-token loss with respect to a few tensors.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from make_goldens import TINY, make
from transformers import AutoModelForCausalLM, JambaConfig, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

LENGTH = 24
PADDED = 7  # tokens of the second row that the masked loss leaves out
CASES = {
    "jamba": JambaConfig(
        **TINY | {"num_hidden_layers": 4, "hidden_size": 24, "intermediate_size": 32},
        num_experts=4,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=4,
        attn_layer_offset=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Matrices N(0, 0.6 / sqrt(fan in)), norms 1 + 0.2 N, biases 0.3 N, and a Mamba
    state that matters: A_log 0.5 N, step bias N - 1, D and taps N."""
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
            elif name.endswith("mamba.D"):
                pass
            elif value.ndim == 1:
                noise = 1 + 0.2 * noise
            else:
                noise = 0.6 * noise / value.shape[-1] ** 0.5
            value.copy_(noise)


def write(name: str, folder: Path) -> None:
    """One random model as save_pretrained writes it, with what it computes."""
    seed = 2000 + sorted(CASES).index(name)
    config = CASES[name]
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(seed).integers(0, 64, (2, LENGTH))
    ids = torch.from_numpy(tokens)
    mask = torch.ones_like(ids)
    mask[1, LENGTH - PADDED :] = 0
    out = model(ids, labels=ids, output_router_logits=True, use_cache=False)
    routers = out.router_logits
    experts = config.num_local_experts
    plain = load_balancing_loss_func(routers, experts, 2)
    masked = load_balancing_loss_func(routers, experts, 2, mask)
    task = out.loss - config.router_aux_loss_coef * out.aux_loss
    task.backward()
    moe = "feed_forward.router" if name == "jamba" else "mlp.gate"
    layer = model.model.layers[1]
    gradients = {
        "router": layer.get_submodule(moe).weight.grad,
        "down": layer.get_submodule(moe.split(".")[0]).experts.down_proj.grad[0],
        "embed": model.model.embed_tokens.weight.grad,
    }
    np.savez(
        folder / "golden.npz",
        tokens=tokens.astype(np.int32),
        logits=out.logits.detach().float().numpy(),
        loss=task.detach().numpy(),
        aux=plain.detach().numpy(),
        aux_masked=masked.detach().numpy(),
        mask=mask.numpy().astype(np.int32),
        **{f"grad_{k}": v.numpy() for k, v in gradients.items()},
    )


if __name__ == "__main__":
    sys.exit(make(__doc__, CASES, write))
