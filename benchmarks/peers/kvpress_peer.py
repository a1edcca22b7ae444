"""kvpress on transformers-PyTorch, CPU: a prompt compressed once it has been read."""

import os
import time
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from protocol import Peer, serve

PRESSES = {
    "snapkv": lambda ratio: kvpress.SnapKVPress(ratio, window_size=32),
    "pyramidkv": lambda ratio: kvpress.PyramidKVPress(ratio, window_size=32),
    "tova": kvpress.TOVAPress,
    "knorm": kvpress.KnormPress,
    "keydiff": kvpress.KeyDiffPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
}


def make(settings: dict[str, Any]) -> Peer:
    """Load settings["gguf"] as settings["dtype"], with settings["threads"]."""
    torch.set_num_threads(settings["threads"])
    path = Path(settings["gguf"])
    dtype = getattr(torch, settings.get("dtype", "float32"))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype
    ).eval()

    def read(tokens: list[int], method: str, budget: int):
        ids, cache = torch.tensor([tokens]), transformers.DynamicCache()
        ratio = max(0.0, 1 - (budget + 0.5) / len(tokens))
        with PRESSES[method](ratio)(model):
            out = model(ids, past_key_values=cache, logits_to_keep=1)
        return cache, out.logits[:, -1:].argmax(-1)

    def behind(ids: torch.Tensor, cache: Any, start: int):
        # Masks are made for the first layer's length: in a layer that holds less
        # (PyramidKV) several tokens would see those behind them.
        uneven = len({layer.keys.shape[2] for layer in cache.layers}) > 1
        size, logits = 1 if uneven else ids.shape[1], []
        for some in ids.split(size, 1):
            at = torch.arange(start, start + some.shape[1])[None]
            logits.append(model(some, past_key_values=cache, position_ids=at).logits)
            start += some.shape[1]
        return torch.cat(logits, 1)

    def answer(cache: Any, start: int, question: list[int], new: int) -> list[int]:
        """Greedy tokens behind a question; the cache is left as it was."""
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        ids, said = torch.tensor([question]), []
        for _ in range(new):
            token = behind(ids, cache, start)[:, -1:].argmax(-1)
            start += ids.shape[1]
            ids = token
            said.append(int(token))
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        return said

    @torch.inference_mode()
    def measure(request: dict[str, Any]) -> dict[str, Any]:
        tokens = request["tokens"]
        began = time.perf_counter()
        cache, token = read(tokens, request["method"], request["budget"])
        read_seconds = time.perf_counter() - began
        held = sum(
            x.numel() * x.element_size()
            for layer in cache.layers
            for x in (layer.keys, layer.values)
        )
        found = {"read_seconds": read_seconds, "cache_bytes": held}
        if asks := request.get("asks"):
            return found | {"answers": [answer(cache, len(tokens), *a) for a in asks]}
        if after := request.get("after"):
            ids = torch.tensor([after])
            logits = behind(ids, cache, len(tokens))[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:])
            return found | {"nll": float(losses)}
        began = time.perf_counter()
        for step in range(request["new"]):
            token = behind(token, cache, len(tokens) + step).argmax(-1)
        return found | {"decode_seconds": time.perf_counter() - began}

    return measure


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve(make)
