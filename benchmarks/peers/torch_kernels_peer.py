"""PyTorch's attention and mamba_ssm's scan, one call timed a request."""

import functools
import importlib.util
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from protocol import Peer, serve
from torch.nn import functional

Run = Callable[[], Any]


def make(settings: dict[str, Any]) -> Peer:
    """Answers a case with the seconds of each implementation that can do it."""
    torch.set_num_threads(settings["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {"attention": attentions, "decode": decodes, "scan": scans}
    held: dict[str, Any] = {}

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps(request, sort_keys=True)
        if held.get("key") != key:
            held.clear()
            held.update(key=key, runs=started(kinds[request["case"]](request, device)))
        return {name: timed(run, device) for name, run in held["runs"].items()}

    return measure


def started(runs: dict[str, Run]) -> dict[str, Run | str]:
    """Those that ran once, and of the others why they did not."""
    found: dict[str, Run | str] = {}
    for name, run in runs.items():
        try:
            run()
            found[name] = run
        except Exception as error:  # the reason becomes the rival's result
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def timed(run: Run | str, device: str) -> dict[str, Any]:
    """Seconds of one call, of a run of calls on a GPU."""
    if isinstance(run, str):
        return {"error": run}
    times = 10 if device == "cuda" else 1
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return {"seconds": (time.perf_counter() - began) / times}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def draw(device: str, *shapes: tuple[int, ...], dtype=torch.bfloat16, grad=False):
    """Normal tensors of the shapes."""
    made = [torch.randn(s, device=device, dtype=dtype) for s in shapes]
    return [x.requires_grad_(grad) for x in made]


def backward(run: Callable, tensors: list) -> Run:
    """The forward and the backward pass."""

    def both():
        for x in tensors:
            x.grad = None
        run(*tensors).float().sum().backward()

    return both


def attentions(ask: dict[str, Any], device: str) -> dict[str, Run]:
    """Causal attention: SDPA where it is dense, FlexAttention for any mask."""
    T, N, K, H = (ask[name] for name in "TNKH")
    shapes = (1, N, T, H), (1, K, T, H), (1, K, T, H)
    tensors = draw(device, *shapes, grad=ask["gradients"])
    runs: dict[str, Callable] = {}
    if not {"window", "block"} & ask.keys():
        runs["sdpa"] = functools.partial(
            functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True
        )
    if device == "cuda":
        from torch.nn.attention import flex_attention as flex

        seen = flex.create_block_mask(visible(ask), None, None, T, T, device)
        compiled = torch.compile(flex.flex_attention)
        runs["flex"] = functools.partial(compiled, block_mask=seen, enable_gqa=True)
    if ask["gradients"]:
        return {name: backward(run, tensors) for name, run in runs.items()}
    return {name: functools.partial(run, *tensors) for name, run in runs.items()}


def visible(ask: dict[str, Any]) -> Callable:
    """The mask of FlexAttention: which key `j` query `i` sees."""

    def seen(b, h, i, j):
        found = j <= i
        if "window" in ask:
            near = i - j < ask["window"]
            found = found & (near | (j < ask["sinks"]) if "sinks" in ask else near)
        if "block" in ask:
            row, column = i // ask["block"], j // ask["block"]
            near = row - column < ask["local"]
            found = found & (near | (column % ask["stride"] == 0))
        return found

    return seen


def decodes(ask: dict[str, Any], device: str) -> dict[str, Run]:
    """One query over a cache."""
    C, N, K, H = (ask[name] for name in "CNKH")
    tensors = draw(device, (1, N, 1, H), (1, K, C, H), (1, K, C, H))
    run = functional.scaled_dot_product_attention
    return {"sdpa": functools.partial(run, *tensors, enable_gqa=True)}


def scans(ask: dict[str, Any], device: str) -> dict[str, Run]:
    """mamba_ssm's CUDA kernel, where that package is installed."""

    def missing():
        importlib.import_module("mamba_ssm")

    if device == "cpu" or importlib.util.find_spec("mamba_ssm") is None:
        return {"mamba_ssm": missing}
    found = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    B, T, C, N = (ask[name] for name in "BTCN")
    shapes = (B, C, T), (B, C, T), (C, N), (B, N, T), (B, N, T)
    grad = ask["gradients"]
    x, raw, a, b, c = draw(device, *shapes, dtype=torch.float32, grad=grad)

    def run(x, raw, a, b, c):
        return found.selective_scan_fn(x, raw, -torch.exp(a), b, c, delta_softplus=True)

    tensors = [x, raw, a, b, c]
    both = backward(run, tensors) if grad else functools.partial(run, *tensors)
    return {"mamba_ssm": both}


if __name__ == "__main__":
    serve(make)
