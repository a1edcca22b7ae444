"""lclm under a cache policy, measured as a user calls it."""

import dataclasses
import time
from typing import Any

import lclm
from benchmarks.peers.protocol import Peer, serve


def make(settings: dict[str, Any]) -> Peer:
    """Load settings["gguf"] in float32; no text is made, as in the peer."""
    from lclm.language_model import LanguageModel

    kept = lclm.load(settings["gguf"])
    lm = LanguageModel(dataclasses.replace(kept.config, eos=()), kept.params)

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        context = lm.prefill(request["tokens"], cache=request["cache"])
        found = {
            "read_seconds": time.perf_counter() - began,
            "cache_bytes": context.stats.bytes,
        }
        if after := request.get("after"):
            return found | {"nll": float(context.nll(after).mean())}
        made = context.generate([], request["new"])
        return found | {"decode_seconds": made.stats.decode_seconds}

    return measure


if __name__ == "__main__":
    serve(make)
