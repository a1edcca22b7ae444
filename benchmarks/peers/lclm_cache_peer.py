"""lclm under a cache policy, measured as a user calls it."""

import dataclasses
import gc
import time
from typing import Any

import numpy as np

import lclm
from benchmarks.peers.protocol import Peer, give_back, reset_peak, serve


def make(settings: dict[str, Any]) -> Peer:
    """Load settings["gguf"], float32 or quantized; no text is made, as in the peer."""
    from lclm.language_model import LanguageModel

    kept = lclm.load(settings["gguf"], quantize=settings.get("quantize"))
    config = dataclasses.replace(kept.config, eos=())
    lm = LanguageModel(config, kept.params, kept.tokenizer)

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        tokens = request.get("tokens")
        if tokens is None:
            tokens = np.random.default_rng(0).integers(0, config.vocab, request["any"])
        if request.get("trim"):
            gc.collect()
            give_back()
            reset_peak()
        began = time.perf_counter()
        chunk = request.get("chunk", 512)
        room = max(0, request.get("room", 0) - len(tokens))
        context = lm.prefill(tokens, cache=request["cache"], chunk=chunk, room=room)
        found = {
            "read_seconds": time.perf_counter() - began,
            "cache_bytes": context.stats.bytes,
        }
        if asks := request.get("asks"):
            said = [context.generate(ask, new).tokens for ask, new in asks]
            return found | {"answers": [list(map(int, row)) for row in said]}
        if after := request.get("after"):
            return found | {"nll": float(context.nll(after).mean())}
        if not request.get("new"):
            return found
        made = context.generate([], request["new"])
        return found | {"decode_seconds": made.stats.decode_seconds}

    return measure


if __name__ == "__main__":
    serve(make)
