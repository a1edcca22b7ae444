"""lclm itself, measured as a user calls it: `prefill`, then `generate` behind it."""

import dataclasses
import time
from typing import Any

import lclm
from benchmarks.peers.protocol import Peer, prompts, serve


def make(settings: dict[str, Any]) -> Peer:
    """Load settings["gguf"] in settings["dtype"]; no text is made, as in the peers."""
    from lclm.language_model import LanguageModel

    kept = lclm.load(
        settings["gguf"], dtype=settings["dtype"], quantize=settings.get("quantize")
    )
    endless = dataclasses.replace(kept.config, eos=())
    lm = LanguageModel(endless, kept.params, dtype=kept.dtype)
    vocab = lm.config.vocab
    held: dict[tuple, Any] = {}

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        length, batch = request["length"], request["batch"]
        cache = request.get("cache", "full")
        rows = prompts(vocab, length, batch)
        if request["case"] == "prefill":
            held.clear()
            began = time.perf_counter()
            context = lm.prefill(rows, cache)
            return {
                "seconds": time.perf_counter() - began,
                "tokens": length * batch,
                "cache_bytes": context.stats.bytes,
            }
        key = (length, batch, cache)
        if key not in held:
            held.clear()
            held[key] = lm.prefill(rows, cache)
        made = held[key].generate([], request["new"])
        made = made[0] if isinstance(made, list) else made
        return {
            "seconds": made.stats.decode_seconds,
            "tokens": made.stats.new_tokens,
            "said": made.tokens,
            "cache_bytes": made.stats.bytes,
        }

    return measure


if __name__ == "__main__":
    serve(make)
