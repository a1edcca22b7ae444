"""lclm's own training step, as `lclm train` runs it."""

import time
from typing import Any

import jax
import numpy as np

from benchmarks.peers.protocol import Peer, prompts, serve
from lclm import hub
from lclm.data.batch import make_batch
from lclm.train.config import train_config
from lclm.train.loop import Trainer

PATTERN = "shifted_groups:group={group}"


def make(settings: dict[str, Any]) -> Peer:
    """Load settings["gguf"] with float32 weights; computes in settings["dtype"]."""
    bundle = hub.load(settings["gguf"])
    held: dict[tuple, Any] = {}

    def trainer(case: str, batch: int, length: int) -> Trainer:
        model: dict[str, Any] = {"source": "smollm2-135m"}
        if case == "lora":
            model["lora"] = {"rank": 8}
        if case == "s2":
            model["pattern"] = PATTERN.format(group=length // 4)
        run = {
            "name": case,
            "model": model,
            "data": {"source": "kjv"},
            "steps": 1000,
            "batch": batch,
            "length": length,
            "compute": settings["dtype"],
            "scan": False,
            "remat": {"kind": "products"},
            "optimizer": {"lr": 1e-5, "schedule": "constant"},
        }
        return Trainer(train_config(run), bundle.config, bundle.params)

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        batch, length = request["batch"], request["length"]
        key = request["case"], batch, length
        if key not in held:
            held.clear()
            held[key] = trainer(*key)
        made = held[key]
        ids = np.asarray(prompts(bundle.config.vocab, length + 1, batch), np.int32)
        rows = {k: jax.device_put(v) for k, v in make_batch(ids).items()}
        began = time.perf_counter()
        made.state, told = made.step(made.state, made.frozen, rows)
        jax.block_until_ready(made.state)
        seconds = time.perf_counter() - began
        loss = float(told["loss"])
        return {"seconds": seconds, "tokens": batch * length, "loss": loss}

    return measure


if __name__ == "__main__":
    serve(make)
