"""llama.cpp through llama-cpp-python, CPU, the same GGUF file as it is."""

import time
from typing import Any

import llama_cpp
import numpy as np
from protocol import Peer, prompts, serve


def make(settings: dict[str, Any]) -> Peer:
    """Load settings["gguf"] with room for settings["room"] tokens."""
    llm = llama_cpp.Llama(
        settings["gguf"],
        n_ctx=settings["room"],
        n_batch=512,
        n_threads=settings["threads"],
        n_threads_batch=settings["threads"],
        verbose=False,
    )
    vocab = llm.n_vocab()
    held: list[int] = []

    def read(length: int) -> float:
        llm.reset()
        row = prompts(vocab, length, 1)[0]
        began = time.perf_counter()
        llm.eval(row)
        best()
        return time.perf_counter() - began

    def best() -> int:
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(vocab,))))

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        length = request["length"]
        if request["batch"] != 1:
            raise ValueError("llama-cpp-python evaluates one sequence at a time")
        if request["case"] == "prefill":
            held.clear()
            return {"seconds": read(length), "tokens": length}
        if held[:1] != [length]:
            read(length)
            held[:] = [length, best()]
        llm.n_tokens, token = held
        said = []
        began = time.perf_counter()
        for _ in range(request["new"]):
            said.append(token)
            llm.eval([token])
            token = best()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": request["new"], "said": said}

    return measure


if __name__ == "__main__":
    serve(make)
