"""transformers' Mamba on PyTorch, CPU: its reference loop, random weights."""

import time
from typing import Any

import torch
import transformers
from protocol import Peer, prompts, serve


def make(settings: dict[str, Any]) -> Peer:
    """The model of settings["model"] (keys of `MambaConfig`), float32."""
    torch.set_num_threads(settings["threads"])
    transformers.logging.set_verbosity_error()
    config = transformers.MambaConfig(**settings["model"])
    model = transformers.MambaForCausalLM(config).eval()
    vocab = config.vocab_size

    @torch.inference_mode()
    def measure(request: dict[str, Any]) -> dict[str, Any]:
        ids = torch.tensor(prompts(vocab, request["length"], 1))
        began = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        if request["case"] == "prefill":
            seconds = time.perf_counter() - began
            return {"seconds": seconds, "tokens": request["length"]}
        began = time.perf_counter()
        for _ in range(request["new"]):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, cache_params=out.cache_params, use_cache=True)
        return {"seconds": time.perf_counter() - began, "tokens": request["new"]}

    return measure


if __name__ == "__main__":
    serve(make)
