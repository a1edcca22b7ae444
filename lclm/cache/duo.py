"""DuoAttention: some kv heads keep the whole text, the others sinks and a window."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lclm import learned
from lclm.cache import read, write
from lclm.cache.base import KV, Cache, CachePolicy, HeadGroup, Heads, Layer, Needs
from lclm.cache.policies import Full, at_least, sees_part
from lclm.cache.step import Step
from lclm.config import AttentionSpec, ModelConfig
from lclm.errors import LclmError
from lclm.ops.codes import check_bits
from lclm.typing import Array, Float

Gates = tuple[tuple[bool, ...], ...]
NONE = Needs()
KIND, RANDOM = "duo_gates", "random"
HINT = (
    "train gates for it (lclm train --config=configs/duo_gates.py:model=FOLDER) and "
    "give duo:gates=FILE"
)


@dataclass(frozen=True)
class Duo(CachePolicy):
    """Full heads keep every token, streaming heads `sinks` first and `window` last.

    arXiv 2410.10819. A query of a streaming head sees the sinks, the `window` tokens
    before it and itself, whatever the chunk: the rule of `streaming`, but every token
    at its own position. `sparsity` is the share of the model's kv heads that stream,
    those of the lowest trained gates; `gates` is a file of them (`lclm train`,
    objective duo_gates), "" the one that comes with lclm for the model, "random" or
    "random:SEED" gates that were not trained. Query heads go with their kv head;
    weights stay as they are. Layers with a pattern or a window of their own keep what
    they see, as under "full".

    `heads` says which kv heads of each layer of the model are full (() for a layer
    without attention); it is read from the gates unless given.
    """

    sinks: int = 64
    window: int = 256
    sparsity: float = 0.5
    gates: str = ""
    heads: Gates = ()
    bits: int = 0

    sizing: ClassVar[str] = "window"

    def __post_init__(self):
        check_bits("duo", self.bits)
        at_least("duo: sinks", self.sinks, 0)
        at_least("duo: window", self.window, 1)
        if not 0 <= self.sparsity <= 1:
            raise LclmError(
                f"duo: sparsity is {self.sparsity}; it is the share of heads that "
                "stream, from 0 to 1"
            )

    def resolve(self, config: ModelConfig) -> tuple["Duo", None]:
        """Which heads of this model are full, from its gates."""
        if self.heads:
            _check(self.heads, config)
            return self, None
        if self._random:
            alpha = _drawn(self.gates, config)
        else:
            found = learned.find(KIND, config, self.gates, hint=HINT)
            alpha = found.params["alpha"]
        chosen = iter(binarised(alpha, self.sparsity))
        heads = tuple(
            next(chosen) if isinstance(layer.mixer, AttentionSpec) else ()
            for layer in config.layers
        )
        return dataclasses.replace(self, heads=heads), None

    def verify(self, config: ModelConfig, model: learned.Model) -> None:
        """Refuse gates that were trained for other weights."""
        if not (self.heads or self._random):
            learned.find(KIND, config, self.gates, hint=HINT, model=model)

    @property
    def _random(self) -> bool:
        return self.gates.partition(":")[0] == RANDOM

    @property
    def kept(self) -> int | None:
        full = any(any(layer) for layer in self.heads)
        return None if full or not self.heads else self.sinks + self.window

    def over(self, layer: Layer) -> CachePolicy:
        return Full(bits=self.bits) if sees_part(layer) else self

    def groups(self, layer: Layer, length: int) -> tuple[HeadGroup, ...]:
        full, near = self._split(layer)
        both = HeadGroup(full, length), HeadGroup(near, self.sinks + self.window)
        return tuple(group for group in both if group.heads)

    def attend(
        self,
        cache: Cache,
        heads: Heads,
        step: Step,
        layer: Layer,
        sink: Array | None = None,
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        """Each head group over its own slots; heads come back in their order."""
        parts = [part for part in self._split(layer) if part]
        outs, groups, order = [], [], []
        for chosen, kv in zip(parts, cache.groups, strict=True):
            full = self.heads[layer.index][chosen[0]]
            queries, own, spec = _of_group(chosen, heads, layer.spec, len(parts))
            read_group = _full if full else self._near
            mine = None if sink is None else sink[queries]
            out, kv = read_group(kv, own, step, Layer(layer.index, spec), mine)
            outs.append(out)
            groups.append(kv)
            order.append(queries)
        if len(outs) == 1:
            return outs[0], Cache(tuple(groups), cache.extra)
        back = np.argsort(np.concatenate(order))
        return jnp.concatenate(outs, 2)[:, :, back], Cache(tuple(groups), cache.extra)

    def lasting(self, layer: Layer) -> tuple[int, ...]:
        return (0,) if self._split(layer)[0] else ()

    def _split(self, layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """kv heads of a layer that are full, and that stream."""
        if not self.heads:
            raise LclmError(
                "duo without gates: which heads are full is not known before "
                "duo.resolve(config) reads them"
            )
        full = self.heads[layer.index]
        return (
            tuple(k for k, whole in enumerate(full) if whole),
            tuple(k for k, whole in enumerate(full) if not whole),
        )

    def _near(
        self, kv: KV, heads: Heads, step: Step, layer: Layer, sink: Array | None
    ) -> tuple[Array, KV]:
        """Streaming heads: slots 0..S-1 are the sinks, the others a ring."""
        S, spec = self.sinks, layer.spec
        if heads.q.shape[1] > 1:
            band = dataclasses.replace(spec, window=self.window + 1, sinks=S)
            near = Layer(layer.index, band)
            if S == 0:
                out, _, new = read.absolute(Cache((kv,)), heads, step, near, sink, NONE)
                return out, write.ring(kv, new, step.after(out))
            parts = Cache((_slots(kv, 0, S), _slots(kv, S, None)))
            out, cache = read.sinks_and_band(parts, heads, step, near, sink)
            return out, write.joined(*cache.groups)
        q = step.rotate(heads.q, spec.rope)
        new = read.new_tokens(heads, step, layer)
        old = dataclasses.replace(kv, k=read.stored_keys(kv, step, layer))
        parts = [
            read.over_all(q, old, step, layer),
            read.within_call(q, new, step, layer, window=None),
        ]
        out, _ = read.combine(parts, sink)
        if spec.rope is not None and spec.rope.dynamic:
            new = read.new_tokens(heads, step, layer, rotated=False)
        return out, write.sinks_and_ring(kv, new, step.after(out), S)


def _full(
    kv: KV, heads: Heads, step: Step, layer: Layer, sink: Array | None
) -> tuple[Array, KV]:
    """Full heads: every token, slot = position."""
    cache = Cache((kv,))
    out, _, new = read.absolute(cache, heads, step, layer, sink, NONE)
    return out, write.append(kv, new, step.after(out))


def _of_group(
    chosen: tuple[int, ...], heads: Heads, spec: AttentionSpec, groups: int
) -> tuple[np.ndarray, Heads, AttentionSpec]:
    """Query heads of the chosen kv heads, projections of both, and their spec."""
    each = spec.heads // spec.kv_heads
    kv = np.asarray(chosen)
    queries = (kv[:, None] * each + np.arange(each)).reshape(-1)
    if groups == 1:
        return queries, heads, spec
    own = Heads(heads.q[:, :, queries], heads.k[:, :, kv], heads.v[:, :, kv])
    return queries, own, dataclasses.replace(spec, heads=len(queries), kv_heads=len(kv))


def _slots(kv: KV, first: int, end: int | None) -> KV:
    return jax.tree.map(lambda x: x[:, :, first:end], kv)


def binarised(alpha: Float[np.ndarray, "L K"], sparsity: float) -> Gates:
    """Which gates are full: those at or above their `sparsity` quantile.

    The quantile is over all gates, clipped to [0, 1], by linear interpolation: of n
    distinct gates n - ceil(sparsity (n - 1)) are full, and exactly as many with ties,
    where the paper's noise is replaced by order: earlier layers, then lower heads.
    """
    gates = np.clip(np.asarray(alpha, np.float64), 0, 1)
    count = gates.size - math.ceil(sparsity * (gates.size - 1) - 1e-9)
    count = 0 if sparsity >= 1 else gates.size if sparsity <= 0 else count
    full = np.zeros(gates.size, bool)
    full[np.argsort(-gates.reshape(-1), kind="stable")[:count]] = True
    return tuple(tuple(row) for row in full.reshape(gates.shape).tolist())


def _drawn(spelled: str, config: ModelConfig) -> Float[np.ndarray, "L K"]:
    """Uniform gates, the same for the same "random:SEED"."""
    seed = spelled.partition(":")[2] or "0"
    if not seed.isdigit():
        raise LclmError(f"duo: gates={spelled!r}; write 'random:SEED', a whole number")
    about = learned.shape(config)
    size = about["layers"], about["kv_heads"]
    return np.random.default_rng(int(seed)).uniform(size=size)


def _check(heads: Gates, config: ModelConfig) -> None:
    """Refuse a choice of heads that is not of this model's shape."""
    wanted = [
        layer.mixer.kv_heads if isinstance(layer.mixer, AttentionSpec) else 0
        for layer in config.layers
    ]
    if [len(layer) for layer in heads] != wanted:
        raise LclmError(
            f"duo: heads for {len(heads)} layers of {sorted({*map(len, heads)})} kv "
            f"heads; this model has {len(wanted)} of {sorted({*wanted})}"
        )
