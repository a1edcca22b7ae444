"""transformers on PyTorch, CPU: the eager loop under `generate`, without its cost."""

import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from protocol import Peer, prompts, serve


def make(settings: dict[str, Any]) -> Peer:
    """Load settings["gguf"] in settings["dtype"] with settings["threads"]."""
    torch.set_num_threads(settings["threads"])
    path = Path(settings["gguf"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, settings["dtype"])
    ).eval()
    vocab = model.config.vocab_size
    held: dict[tuple[int, int], Any] = {}

    @torch.inference_mode()
    def read(length: int, batch: int):
        ids = torch.tensor(prompts(vocab, length, batch))
        began = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began, out

    @torch.inference_mode()
    def measure(request: dict[str, Any]) -> dict[str, Any]:
        length, batch = request["length"], request["batch"]
        if request["case"] == "prefill":
            held.clear()
            seconds, _ = read(length, batch)
            return {"seconds": seconds, "tokens": length * batch}
        if (length, batch) not in held:
            held.clear()
            out = read(length, batch)[1]
            held[length, batch] = (out.past_key_values, out.logits[:, -1:].argmax(-1))
        past, token = held[length, batch]
        said = []
        began = time.perf_counter()
        for _ in range(request["new"]):
            said.append(token)
            out = model(token, past_key_values=past, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        seconds = time.perf_counter() - began
        past.crop(-request["new"])
        return {
            "seconds": seconds,
            "tokens": request["new"] * batch,
            "said": torch.cat(said, 1)[0].tolist(),
        }

    return measure


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve(make)
