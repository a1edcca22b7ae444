"""The object `lclm.load` returns: a model, its tokenizer, and everything it can do."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lclm import cache as policies
from lclm import hub
from lclm.blocks.layer import init_states, state_bytes
from lclm.cache.base import CachePolicy, fit, measured_bytes
from lclm.config import ModelConfig
from lclm.context import Context
from lclm.errors import LclmError
from lclm.models.decoder import Decoder
from lclm.models.extend import read_rope, with_rope
from lclm.ops.int8 import quantize_params
from lclm.ops.sampling import Sampler
from lclm.serve import recompute, snapshot
from lclm.serve.calls import Engine, dense_logits, forms
from lclm.serve.generate import Request
from lclm.serve.marks import hindrance
from lclm.serve.result import Generation, Stats, Stream
from lclm.serve.session import Session
from lclm.typing import Array, Float, Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

Prompt = str | Sequence[int] | np.ndarray
Policy = str | dict[str, Any] | CachePolicy


def load(
    source: str | Path,
    *,
    dtype: str = "float32",
    mesh: Any = None,
    packed: str | None = None,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    rope: str | None = None,
) -> "LanguageModel":
    """Load a known name, a Hugging Face folder, a .gguf file or an lclm checkpoint.

    dtype: "float32" or "bfloat16", of the weights and the cache. packed: "int8" or
    "int4" keeps GGUF weights as they are shipped. quantize: "int8" rounds every matrix
    to int8 rows, the fast form of decoding on a CPU and half the memory of bfloat16;
    norms stay as they are. adapter: a folder of a LoRA adapter of this model (ours or
    PEFT's), merged into its weights or, where they are packed, laid beside them. rope:
    other rotary embeddings for the same weights, "linear:factor=4" (PI), "ntk:...",
    "dynamic:...", "yarn:..."; options are those of `lclm.models.extend.Rope`. mesh: a
    `jax.sharding.Mesh` to place the weights on; None leaves them on the default device.
    """
    if dtype not in DTYPES:
        raise LclmError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    if quantize is not None and packed is not None:
        raise LclmError(
            f"packed={packed!r} keeps weights as shipped and quantize={quantize!r} "
            "rounds them anew: give one of the two"
        )
    change = None if rope is None else read_rope(rope)
    wide = jnp.float32 if quantize else DTYPES[dtype]
    bundle = hub.load(source, dtype=wide, packed=packed)
    if adapter is not None:
        bundle = hub.with_adapter(bundle, adapter)
    config, params = bundle.config, bundle.params
    if change is not None:
        config = with_rope(config, change)
    if quantize is not None:
        params = quantize_params(params, quantize)
    params = jax.tree.map(jnp.asarray, params)
    if mesh is not None:
        from lclm import sharding

        params = sharding.place(params, mesh)
    return LanguageModel(
        config, params, bundle.tokenizer, dtype=DTYPES[dtype], name=str(source)
    )


class LanguageModel:
    """A decoder with its parameters and tokenizer (None where the source has none)."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Any = None,
        *,
        dtype: Any = jnp.float32,
        name: str = "",
    ):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.name = name
        self.last_stats = Stats()
        # A CPU converts bfloat16 activations at every step; there they stay float32.
        activations = jnp.float32 if jax.default_backend() == "cpu" else dtype
        self.model = Decoder(config, dtype=activations)
        self._engine = Engine(config, params, activations, dtype, name=name)

    def logits(self, tokens: Any) -> Float[Array, "B T V"]:
        """float32 [B, T, V]: dense parallel forward over int [B, T]."""
        tokens = self._tokens(tokens)
        with forms(self._engine.spread):
            return dense_logits(
                self.params, tokens, config=self.config, dtype=self._engine.dtype
            )

    def nll(
        self,
        tokens: Any,
        cache: Policy = "full",
        chunk: int = 512,
        *,
        room: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """float32 [B, T-1]: loss in nats of each next token under a cache policy.

        Every token is read by the policy's own rule whatever the chunk; policies that
        compact do so at chunk ends. The cache has room for `room` more tokens: texts
        whose sums agree share programs. `progress` is told the tokens read so far.
        """
        tokens, policy = self._tokens(tokens), self._policy(cache)
        kept = policy.kept
        rows, length = tokens.shape
        if length < 2:
            raise LclmError(
                f"{length} token per row leaves nothing to predict: give 2+"
            )
        if policy.settles:
            raise LclmError(
                f"{cache!r} cuts a prompt once it has been read, and a loss has no "
                "prompt; use at=chunk, or ask a context that prefill() read"
            )
        began = time.perf_counter()
        if policy.recompute:
            out = recompute.nll(self._engine, policy, tokens, progress)
            held = 0
        else:
            session = Session(
                self._engine,
                policy,
                rows=rows,
                length=length - 1 + room,
                chunk=chunk,
            )
            out = session.nll(tokens, progress)
            kept, held = session.policy.kept, measured_bytes(session.caches)
        self.last_stats = Stats(
            bytes=held,
            kept=kept,
            prompt_tokens=rows * (length - 1),
            prefill_seconds=time.perf_counter() - began,
        )
        return out

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        cache: Policy = "full",
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        stream: bool = False,
        chunk: int = 512,
        room: int = 0,
    ) -> Generation | list[Generation] | Stream:
        """Continue a prompt (text or tokens), or a list of them as one ragged batch.

        Greedy at temperature 0. With `stream` the result is iterated for text pieces
        and holds `.result` when done. Several prompts give a list in their order. The
        cache has room for `room` tokens behind the prompt, `max_new_tokens` at least:
        prompts whose sums agree share their compiled programs.
        """
        sampler = Sampler(temperature, top_k, top_p, min_p)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        request = Request(max_new_tokens, sampler, stop, seed)
        rows, single = self._rows(prompt)
        policy = self._policy(cache)
        if policy.recompute:
            out = recompute.generate(
                self._engine, policy, rows, request, self.tokenizer
            )
            self.last_stats = out[0].stats
            return out[0] if single else out
        if stream and not single:
            raise LclmError("stream=True takes one prompt; generate them one by one")
        context = self._read(rows, policy, chunk, extra=max(max_new_tokens, room))
        return context._continue(request, stream=stream, single=single)

    def prefill(
        self,
        text: Prompt | Sequence[Prompt],
        cache: Policy = "full",
        chunk: int = 512,
        *,
        room: int = 0,
    ) -> Context:
        """Read once, ask many times: the question is not known yet.

        `room` tokens of questions and answers then fit without a new allocation.
        """
        rows, single = self._rows(text)
        policy = self._policy(cache)
        if policy.recompute:
            raise LclmError(
                "recompute keeps no cache to read into; use it with nll or generate"
            )
        context = self._read(rows, policy, chunk, extra=room)
        context.single = single
        return context

    def load_context(self, file: str | Path) -> Context:
        """A context that `Context.save` wrote for this same model."""
        session, stats, single = snapshot.load(file, self._engine)
        return Context(self, session, stats, single=single)

    def save(self, folder: str | Path, format: str = "hf") -> Path:
        """Write "hf" (safetensors, config.json, tokenizer) or "orbax"."""
        writers = {"hf": hub.save_hf, "orbax": hub.save_orbax}
        if format not in writers:
            raise LclmError(f"format {format!r}: use one of {', '.join(writers)}")
        bundle = hub.Bundle(self.config, self.params, self.tokenizer, str(folder))
        writers[format](folder, bundle)
        return Path(folder)

    def resumes(self, cache: Policy) -> bool:
        """Whether contexts under a policy may `resume` at any place of their text."""
        policy = self._policy(cache)
        if policy.recompute:
            return False
        policy, _ = policy.resolve(self.config)
        dtype = self._engine.cache_dtype
        states = jax.eval_shape(lambda: init_states(self.config, policy, 1, 16, dtype))
        return hindrance(self.config, policy, states) is None

    def cache_bytes(self, cache: Policy, length: int, batch: int = 1) -> int:
        """Bytes of caches and states for rows of `length` tokens, from shapes."""
        dtype = self._engine.cache_dtype
        policy, _ = fit(self._policy(cache), self.config, dtype, length)
        return state_bytes(self.config, policy, batch, length, dtype)

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Tokens of a text; a first text gets the start token its model wants."""
        if self.tokenizer is None:
            raise LclmError(
                "this model has no tokenizer: give tokens instead of text, or put a "
                "tokenizer.json beside its weights"
            )
        return self.tokenizer.encode(text, bos=first and self.tokenizer.add_bos)

    def _read(
        self, rows: list[list[int]], policy: CachePolicy, chunk: int, extra: int = 0
    ) -> Context:
        longest = max(len(r) for r in rows)
        began = time.perf_counter()
        session = Session(
            self._engine, policy, rows=len(rows), length=longest + extra, chunk=chunk
        )
        session.read(rows)
        session.settle()
        jax.block_until_ready((session.last, session.caches))
        stats = Stats(
            bytes=measured_bytes(session.caches),
            kept=session.policy.kept,
            prompt_tokens=sum(len(r) for r in rows),
            prefill_seconds=time.perf_counter() - began,
        )
        self.last_stats = stats
        return Context(self, session, stats)

    def _policy(self, cache: Policy) -> CachePolicy:
        return policies.make(cache).encoded(self.tokenizer)

    def _tokens(self, tokens: Any) -> np.ndarray:
        """int32 [B, T], every id inside the vocabulary."""
        array = np.asarray(tokens)
        if array.ndim == 1:
            array = array[None]
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            raise LclmError(
                f"tokens have shape {array.shape} and type {array.dtype}; expected "
                "integers [B, T]"
            )
        if array.size == 0:
            raise LclmError("no tokens: give at least one token per row")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.config.vocab:
            raise LclmError(
                f"token {low if low < 0 else high} is outside the vocabulary "
                f"0..{self.config.vocab - 1}"
            )
        return array.astype(np.int32)

    def _rows(self, prompt: Any) -> tuple[list[list[int]], bool]:
        """Prompts as token rows, and whether there was only one."""
        single = isinstance(prompt, str) or (
            len(prompt) > 0 and isinstance(prompt[0], int | np.integer)
        )
        if isinstance(prompt, np.ndarray) and prompt.ndim == 2:
            single = False
        prompts = [prompt] if single else list(prompt)
        rows = []
        for i, each in enumerate(prompts):
            tokens = self.encode(each) if isinstance(each, str) else each
            if len(tokens) == 0:
                raise LclmError(f"prompt {i} is empty: give at least one token")
            rows.append(self._tokens(tokens)[0].tolist())
        if not rows:
            raise LclmError("no prompts: give text, tokens, or a list of them")
        return rows, single


__all__ = ["Context", "LanguageModel", "load"]
