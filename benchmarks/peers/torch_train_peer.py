"""transformers (and peft) on PyTorch, CPU: one optimizer step as its users write it."""

import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from protocol import Peer, prompts, serve


def make(settings: dict[str, Any]) -> Peer:
    """Load settings["gguf"] with float32 weights; autocast to settings["dtype"]."""
    torch.set_num_threads(settings["threads"])
    path = Path(settings["gguf"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    narrow = settings["dtype"] == "bfloat16"
    held: dict[str, Any] = {}

    def load(case: str) -> tuple[Any, Any]:
        held.clear()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).train()
        if case == "lora":
            import peft

            wanted = ["q_proj", "k_proj", "v_proj", "o_proj"]
            spec = peft.LoraConfig(
                r=8, lora_alpha=16, target_modules=wanted, lora_dropout=0.0
            )
            model = peft.get_peft_model(model, spec)
        trained = [p for p in model.parameters() if p.requires_grad]
        held[case] = model, torch.optim.AdamW(trained, lr=1e-5, fused=True)
        return held[case]

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        case, length = request["case"], request["length"]
        model, optimizer = held[case] if case in held else load(case)
        ids = torch.tensor(prompts(model.config.vocab_size, length, request["batch"]))
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": ids.numel(), "loss": loss.item()}

    return measure


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve(make)
