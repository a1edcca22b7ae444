"""Locret (arXiv 2410.01805): trained heads say which tokens stay."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from lclm import learned
from lclm.cache import read
from lclm.cache.base import KV, Cache, Evidence, Heads, Layer, Needs, layers_of
from lclm.cache.evict import Evicting
from lclm.cache.policies import at_least
from lclm.cache.step import Step
from lclm.config import ModelConfig
from lclm.errors import LclmError, unknown
from lclm.ops.retaining import scores
from lclm.typing import Array

POSITIONS = ("absolute", "slot")
KIND, RANDOM = "locret_heads", "random"
HINT = (
    "train heads for it (lclm train --config=configs/locret_heads.py:model=FOLDER) and "
    "give locret:heads=FILE"
)
HIDDEN = 256  # units of random heads


@dataclass(frozen=True)
class Locret(Evicting):
    """Each token is scored once, by its own q, k and v, and the best stay.

    A layer's retaining head, an MLP over the token's projections before rotation, gives
    a score to each of its kv heads; the score travels with the slot. `heads` is a file
    of them (`lclm train`, objective locret_heads), "" the one that comes with lclm for
    the model, "random" or "random:SEED" heads that were not trained.

    at="chunk": at the end of every call the last `stabilizers` tokens (a quarter of
    the budget unless given) and at least the last `local` stay, whatever their scores.
    The paper takes the stabilizers' protection off in a prompt's last chunk, appends
    `local` tokens to the budget, and decodes without evicting; here no call knows that
    it is the last, `local` is part of the budget, and a decoded token takes a slot.
    at="end": a prompt is cut once, as the paper's last chunk is: only `local` (100, at
    most a quarter of the budget) is protected, and what follows is kept.

    positions="absolute" leaves tokens where they stood, as the frozen model saw them
    when the heads were trained; "slot", the paper's, numbers the kept tokens from 0 on,
    so that positions stay below budget + chunk: keys are stored unrotated and the
    slots stay in order, which costs a rotation and, a decoded token, a copy of them.
    """

    sinks: int = 0
    stabilizers: int | None = None
    local: int | None = None
    positions: str = "absolute"
    heads: str = ""

    needs: ClassVar[Needs] = Needs(queries=True, keys=True, params=True)

    def __post_init__(self):
        if self.recent is not None:
            raise LclmError(
                f"locret: recent={self.recent}: the last tokens that stay are called "
                "stabilizers= (of every chunk) and local= (of a prompt)"
            )
        for name in ("stabilizers", "local"):
            if getattr(self, name) is not None:
                at_least(f"locret: {name}", getattr(self, name), 0)
        if self.positions not in POSITIONS:
            raise unknown("positions of locret", self.positions, POSITIONS)
        if self.bits and self.ordered:
            raise LclmError(
                f"locret: bits={self.bits} with positions=slot, which rotates all "
                "slots in every call and would decode them all; use positions=absolute"
            )
        super().__post_init__()

    @property
    def protected_recent(self) -> int:
        quarter = max(1, self.budget // 4)
        local = min(100, quarter) if self.local is None else self.local
        if self.at == "end":
            return max(1, local)
        last = quarter if self.stabilizers is None else self.stabilizers
        return max(1, local, last)

    @property
    def ordered(self) -> bool:
        return self.positions == "slot"

    def resolve(self, config: ModelConfig) -> tuple["Locret", Any]:
        """The heads of each layer: {"w1" [F, (N + 2K) H], "w2" [K, F]}, float32."""
        layers = layers_of(config)
        if not layers:
            raise LclmError("locret over a model without attention layers: use 'full'")
        if self._random:
            found = draw(layers, self.heads)
        else:
            found = learned.find(KIND, config, self.heads, hint=HINT).params
        by_layer: list[Any] = [None] * len(config.layers)
        for layer in layers:
            by_layer[layer.index] = {
                name: value[layer.rank].astype(np.float32)
                for name, value in found.items()
            }
        return self, tuple(by_layer)

    def verify(self, config: ModelConfig, model: learned.Model) -> None:
        """Refuse heads that were trained for other weights."""
        if not self._random:
            learned.find(KIND, config, self.heads, hint=HINT, model=model)

    @property
    def _random(self) -> bool:
        return self.heads.partition(":")[0] == RANDOM

    def note(
        self, cache: Cache, new: KV, step: Step, layer: Layer, evidence: Evidence
    ) -> tuple[Array, Array, dict[str, Array]]:
        own = step.policy[layer.index]
        v = jnp.swapaxes(new.v, 1, 2)
        found = scores(evidence.queries, evidence.keys, v, own["w1"], own["w2"])
        fresh = jnp.swapaxes(found, 1, 2).astype(jnp.float32)
        return cache.extra["score"], fresh, {}

    def look(
        self,
        cache: Cache,
        heads: Heads,
        step: Step,
        layer: Layer,
        sink: Array | None,
        needs: Needs,
    ) -> tuple[Array, Evidence, KV]:
        if not self.ordered:
            return super().look(cache, heads, step, layer, sink, needs)
        out = by_slot(cache, heads, step, layer, sink)
        new = read.new_tokens(heads, step, layer, rotated=False)
        return out, Evidence(queries=heads.q, keys=heads.k), new


def by_slot(
    cache: Cache, heads: Heads, step: Step, layer: Layer, sink: Array | None
) -> Array:
    """Attention at positions counted over the kept tokens, whose keys are unrotated."""
    spec, (kv,) = layer.spec, cache.groups
    held = jnp.sum(kv.pos[:, :1] >= 0, -1, dtype=jnp.int32)
    at = jnp.where(step.valid, held + step.positions - step.start[:, None], -1)
    slots = lax.iota(jnp.int32, kv.k.shape[2])[None]
    q, k = (step.rotate_to(x, at, spec.rope) for x in (heads.q, heads.k))
    old = step.rotate_to(jnp.swapaxes(kv.k, 1, 2), slots, spec.rope)
    new = read.new_tokens(Heads(heads.q, k, heads.v), step, layer, rotated=False)
    parts = [
        read.over_slots(
            q, jnp.swapaxes(old, 1, 2), kv, step, layer, window=spec.window
        ),
        read.within_call(q, new, step, layer, window=spec.window),
    ]
    return read.combine(parts, sink)[0]


def draw(layers: tuple[Layer, ...], spelled: str) -> dict[str, list[np.ndarray]]:
    """Untrained heads for layers of any shape, the same for the same "random:SEED"."""
    seed = spelled.partition(":")[2] or "0"
    if not seed.isdigit():
        raise LclmError(f"locret: heads={spelled!r}; write 'random:SEED', a number")
    rng = np.random.default_rng(int(seed))

    def uniform(rows: int, columns: int) -> np.ndarray:
        return rng.uniform(-1, 1, (rows, columns)) * columns**-0.5

    sizes = [(_width(layer), layer.spec.kv_heads) for layer in layers]
    return {
        "w1": [uniform(HIDDEN, width) for width, _ in sizes],
        "w2": [uniform(kv_heads, HIDDEN) for _, kv_heads in sizes],
    }


def _width(layer: Layer) -> int:
    spec = layer.spec
    return (spec.heads + 2 * spec.kv_heads) * spec.head_dim
