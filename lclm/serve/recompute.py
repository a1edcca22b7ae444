"""Sliding window with re-computation: the baseline that keeps no cache."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lclm.cache.policies import Recompute
from lclm.models.decoder import Decoder, loss_table, unembed
from lclm.ops.loss import token_nll
from lclm.ops.sampling import sample
from lclm.serve.calls import NLL_TOKENS, Engine
from lclm.serve.generate import Request, _Row
from lclm.serve.result import Generation, Stats


@functools.partial(jax.jit, static_argnames=("config", "dtype", "last"))
def _window_nll(params, tokens, targets, *, config, dtype, last):
    """Losses of the last `last` targets of one window."""
    hidden, _ = Decoder(config, dtype=dtype).apply({"params": params}, tokens)
    return token_nll(
        hidden[:, -last:],
        loss_table(config, params, dtype),
        targets[:, -last:],
        chunk=min(NLL_TOKENS, last),
        softcap=config.final_softcap,
    )


def nll(
    engine: Engine,
    policy: Recompute,
    tokens: np.ndarray,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """float32 [B, T-1]: every token scored after a fresh pass over its window."""
    total, window = tokens.shape[1] - 1, min(policy.window, tokens.shape[1] - 1)
    static = {"config": engine.config, "dtype": engine.dtype}
    out = np.zeros((len(tokens), total), np.float32)
    at = 0
    while at < total:
        last = window if at == 0 else min(policy.stride, total - at)
        end = at + last
        out[:, at:end] = _window_nll(
            engine.params,
            tokens[:, end - window : end],
            tokens[:, end - window + 1 : end + 1],
            last=last,
            **static,
        )
        at = end
        if progress is not None:
            progress(at)
    return out


@functools.partial(jax.jit, static_argnames=("config", "dtype", "sampler"))
def _next(params, tokens, count, key, *, config, dtype, sampler):
    """One token after the first `count` of a padded window."""
    hidden, _ = Decoder(config, dtype=dtype).apply({"params": params}, tokens)
    last = jnp.take_along_axis(hidden, (count - 1)[:, None, None], 1)[:, 0]
    return sample(unembed(config, params, last), key, sampler)


def generate(
    engine: Engine,
    policy: Recompute,
    prompts: list[list[int]],
    request: Request,
    tokenizer: Any,
) -> list[Generation]:
    """Continue each prompt, re-reading the last `window` tokens for every new one."""
    stats = Stats(kept=policy.window, prompt_tokens=sum(map(len, prompts)))
    began = time.perf_counter()
    rows = []
    for b, prompt in enumerate(prompts):
        row, text = _Row(tokenizer, request.stop), list(prompt)
        key = jax.random.fold_in(jax.random.key(request.seed), b)
        for _ in range(request.max_new_tokens):
            seen = text[-policy.window :]
            padded = np.zeros((1, policy.window), np.int32)
            padded[0, : len(seen)] = seen
            token = int(
                _next(
                    engine.params,
                    padded,
                    np.array([len(seen)], np.int32),
                    jax.random.fold_in(key, len(text))[None],
                    config=engine.config,
                    dtype=engine.dtype,
                    sampler=request.sampler,
                )[0]
            )
            if token in engine.config.eos:
                break
            text.append(token)
            row.push(token)
            if row.done:
                break
        row.finish()
        rows.append(row)
    stats.decode_seconds = time.perf_counter() - began
    stats.new_tokens = sum(len(row.tokens) for row in rows)
    return [
        Generation(row.text if tokenizer is not None else None, row.tokens, stats)
        for row in rows
    ]
