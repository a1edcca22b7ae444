"""InfiniPot: a pot of tokens that is distilled whenever it is full."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lclm.cache import read, write
from lclm.cache.base import (
    KV,
    Cache,
    CachePolicy,
    Evidence,
    Heads,
    Layer,
    Needs,
    Overflow,
)
from lclm.cache.policies import Absolute, Full, at_least, fixed_angles, sees_part
from lclm.cache.step import Step
from lclm.config import ModelConfig, RopeSpec
from lclm.errors import LclmError
from lclm.ops import rope
from lclm.ops.codes import TILE, Codes, check_bits
from lclm.typing import Array, Float, Int, Leaf
from pallas_kernels.decode import column_sums

CATALYST = "\n\nSummarise the text so far. Its most important points are:"
BIG = 1e30


@dataclass(frozen=True)
class InfiniPot(Absolute):
    """Continual context distillation (InfiniPot, arXiv 2410.01518).

    Tokens fill a pot of `budget` places. When a call would not fit, the model reads the
    `catalyst` on top of the pot, and each kv head keeps `keep` tokens (None: half the
    budget): `sinks` first ones (None: 4, fewer in a small pot), then those that were
    least expected, up to a share `alpha` of `keep` (NuC), then those the catalyst
    attends to most (CaP), summed over its tokens or their `reduce="max"`, over the
    query heads of a kv head. The catalyst leaves nothing behind.

    Positions are places in the pot, below `budget` however long the text: survivors
    move to the first places in their order and keys are rotated along (CR-RoPE), which
    rounds keys once a move (with `bits` they are coded anew); queries sit behind them.
    Places for the catalyst stay free.

    The default catalyst knows no question; the question itself as `catalyst` (CaP-Q)
    makes the pot query-aware, so say which it was. Text takes the model's tokenizer; a
    model without one takes token ids. Layers with a pattern or a narrower window of
    their own keep what they see, as under "full".
    """

    budget: int = 4096
    keep: int | None = None
    alpha: float = 0.5
    sinks: int | None = None
    catalyst: str | tuple[int, ...] = CATALYST
    reduce: str = "sum"
    bits: int = 0

    compacts: ClassVar[bool] = True
    sizing: ClassVar[str] = "budget"

    def __post_init__(self):
        check_bits("infinipot", self.bits)
        at_least("infinipot: budget", self.budget, 2)
        at_least("infinipot: keep", self.distilled, 1)
        at_least("infinipot: sinks", self.protected, 0)
        if not isinstance(self.catalyst, str):
            object.__setattr__(self, "catalyst", tuple(self.catalyst))
        if not 0 <= self.alpha <= 1:
            raise LclmError(
                f"infinipot: alpha is {self.alpha}; it is a share of `keep`, 0 to 1"
            )
        if self.reduce not in ("sum", "max"):
            raise LclmError(f"infinipot: reduce is {self.reduce!r}; use 'sum' or 'max'")
        if self.protected > self.distilled:
            raise LclmError(
                f"infinipot: keep {self.distilled} is below the {self.protected} sinks "
                "it protects; raise keep or protect fewer"
            )
        if self.alpha < 1 and len(self.catalyst) == 0:
            raise LclmError(
                f"infinipot: alpha is {self.alpha} and the catalyst is empty; give "
                "text or token ids to read, or alpha=1"
            )
        known = () if isinstance(self.catalyst, str) else self.tokens
        if self.budget - self.distilled - len(known) < 1:
            raise LclmError(
                f"infinipot: budget {self.budget} has no room beside the "
                f"{self.distilled} tokens to keep and a catalyst of {len(known)}; "
                "raise the budget or keep fewer"
            )

    @property
    def distilled(self) -> int:
        """Tokens a kv head keeps of a full pot."""
        return self.budget // 2 if self.keep is None else self.keep

    @property
    def protected(self) -> int:
        """First tokens that always stay."""
        return min(4, self.distilled // 4) if self.sinks is None else self.sinks

    @property
    def novel(self) -> int:
        """Tokens of `distilled` that stay for their novelty."""
        return int(self.alpha * self.distilled + 0.5)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The catalyst as the model reads it; none where only novelty counts."""
        if self.novel == self.distilled:
            return ()
        if isinstance(self.catalyst, str):
            raise LclmError(
                f"infinipot: the catalyst {self.catalyst!r} is text and this model has "
                "no tokenizer; give token ids, "
                "{'name': 'infinipot', 'catalyst': [5, 6]}"
            )
        return self.catalyst

    @property
    def needs(self) -> Needs:
        """What it looks at; nothing but losses outside a catalyst."""
        return Needs(nll=self.novel > 0)

    @property
    def overflow(self) -> Overflow:
        """What the engine does with a full pot."""
        catalyst = self.tokens
        room = self.budget - self.distilled - len(catalyst)
        return Overflow(room, catalyst)

    @property
    def kept(self) -> int:
        return self.budget

    def encoded(self, tokenizer: Any) -> "InfiniPot":
        """The policy with its catalyst as tokens."""
        if tokenizer is None or not isinstance(self.catalyst, str):
            return self
        ids = tuple(tokenizer.encode(self.catalyst, bos=False))
        return dataclasses.replace(self, catalyst=ids)

    def resolve(self, config: ModelConfig) -> tuple["InfiniPot", None]:
        """Refuse catalyst tokens outside the model's vocabulary."""
        known = () if isinstance(self.catalyst, str) else self.catalyst
        wrong = [t for t in known if not 0 <= t < config.vocab]
        if wrong:
            raise LclmError(
                f"infinipot: catalyst token {wrong[0]} is outside the vocabulary "
                f"0..{config.vocab - 1}; encode the text with this model's tokenizer"
            )
        return self, None

    def capacity(self, layer: Layer, length: int) -> int:
        return min(self.budget, length)

    def over(self, layer: Layer) -> CachePolicy:
        return Full(bits=self.bits) if sees_part(layer, self.budget) else self

    def init(self, layer: Layer, batch: int, length: int, dtype: Any) -> Cache:
        fixed_angles("infinipot", layer)
        (kv,) = super().init(layer, batch, length, dtype).groups
        extra = {"shift": jnp.zeros(batch, jnp.int32)}
        if self.needs.nll:
            extra["novelty"] = jnp.zeros(kv.k.shape[:3], jnp.float32)
        return Cache((kv,), extra)

    def attend(
        self,
        cache: Cache,
        heads: Heads,
        step: Step,
        layer: Layer,
        sink: Array | None = None,
    ) -> tuple[Array, Cache]:
        """Attend at the places of the pot, then append (or only weigh)."""
        step = step.earlier(cache.extra["shift"])
        if step.weigh:
            out, mass = self._mass(cache, heads, step, layer, sink)
            return out, self.weigh(cache, Evidence(mass), step)
        out, evidence, new = read.absolute(cache, heads, step, layer, sink, Needs())
        return out, self.update(cache, new, step.after(out), layer, evidence)

    def update(
        self, cache: Cache, new: KV, step: Step, layer: Layer, evidence: Evidence
    ) -> Cache:
        (kv,) = cache.groups
        return Cache((write.append(kv, new, step),), cache.extra)

    def observe(
        self, cache: Cache, nll: Float[Array, "B T"], step_positions: Int[Array, "B T"]
    ) -> Cache:
        """Note the novelty of the tokens just appended, one value for all heads."""
        if "novelty" not in cache.extra:
            return cache
        (kv,), old = cache.groups, cache.extra["novelty"]
        value = jnp.broadcast_to(nll[:, None], (*old.shape[:2], nll.shape[1]))
        start = _filled(kv) - jnp.sum(step_positions >= 0, 1, dtype=jnp.int32)
        novelty = write.put(old[..., None], value[..., None], start)[..., 0]
        return Cache(cache.groups, cache.extra | {"novelty": novelty})

    def weigh(self, cache: Cache, evidence: Evidence, step: Step) -> Cache:
        """Hold what the catalyst attends to until `compact`."""
        return Cache(cache.groups, cache.extra | {"score": evidence.mass_old})

    def compact(self, cache: Cache, layer: Layer) -> Cache:
        """Keep `distilled` tokens a head, in order, at the first places."""
        (kv,), extra = cache.groups, dict(cache.extra)
        score = extra.pop("score", jnp.zeros(kv.k.shape[:3], jnp.float32))
        index = jnp.maximum(self._chosen(kv, score, extra.get("novelty")), 0)

        def pick(old: Array) -> Array:
            at = index.reshape(*index.shape, *[1] * (old.ndim - 3))
            return jnp.take_along_axis(old, at, 2)

        def front(old: Leaf, new: Leaf) -> Leaf:
            return jax.tree.map(
                lambda x, y: lax.dynamic_update_slice_in_dim(x, y, 0, 2), old, new
            )

        place = lax.iota(jnp.int32, kv.pos.shape[2])
        k, v = jax.tree.map(pick, (kv.k, kv.v))
        k = moved(k, place[: self.distilled] - index, layer.spec.rope)
        pos = jnp.where(place < self.distilled, place, -1)
        if "novelty" in extra:
            extra["novelty"] = front(extra["novelty"], pick(extra["novelty"]))
        extra["shift"] = extra["shift"] + _filled(kv) - self.distilled
        kv = KV(
            front(kv.k, k),
            front(kv.v, v),
            jnp.broadcast_to(pos, kv.pos.shape),
        )
        return Cache((kv,), extra)

    def _chosen(self, kv: KV, score: Array, novelty: Array | None) -> Array:
        """Places [B, K, distilled] that stay, in order; ties go to the earlier one."""
        pos = jnp.broadcast_to(kv.pos, score.shape)
        stays = pos < self.protected
        if self.novel:
            rank = jnp.where(stays, BIG, novelty)
            rank = jnp.where(pos >= 0, rank, -jnp.inf)
            _, top = lax.top_k(rank, self.novel)
            stays = jnp.put_along_axis(stays, top, True, 2, inplace=False)
        return write.best(jnp.where(stays, BIG, score), pos, self.distilled)

    def _mass(
        self, cache: Cache, heads: Heads, step: Step, layer: Layer, sink: Array | None
    ) -> tuple[Array, Array]:
        """The catalyst's output, and how it attends to each place: float32 [B, K, C].

        Probabilities are summed over the query heads of a kv head.
        """
        (kv,), spec = cache.groups, layer.spec
        q = step.rotate(heads.q, spec.rope)
        new = read.new_tokens(heads, step, layer)
        parts = [
            read.over_slots(q, kv.k, kv, step, layer, window=spec.window),
            read.within_call(q, new, step, layer, window=spec.window),
        ]
        out, lse = read.combine(parts, sink)
        at = step.after(out).positions

        def sums(q: Array, lse: Array, at: Array) -> Array:
            shared = {"scale": spec.scale, "softcap": spec.softcap}
            return column_sums(q, kv.k, lse, at, kv.pos, **shared)

        if self.reduce == "sum":
            return out, sums(q, lse, at)
        each = (
            jnp.moveaxis(q, 1, 0)[:, :, None],
            jnp.moveaxis(lse, 2, 0)[..., None],
            at.T[..., None],
        )
        return out, jnp.max(lax.map(lambda one: sums(*one), each), 0)


def turned(
    k: Float[Array, "B K C H"], by: Int[Array, "B K C"], spec: RopeSpec | None
) -> Float[Array, "B K C H"]:
    """Rotated keys moved `by` positions, exactly as they were where that is 0."""
    if spec is None:
        return k
    size = k.shape[-1]
    _, factor = rope.frequencies(spec, size)  # the keys have it in them already
    cos, sin = rope.angles(by.reshape(-1, by.shape[2]), spec, size)
    flat = k.reshape(-1, k.shape[2], 1, size)
    moved = rope.rotate(flat, cos / factor, sin / factor, layout=spec.layout)
    return moved.reshape(k.shape)


def moved(k: Leaf, by: Int[Array, "B K C"], spec: RopeSpec | None) -> Leaf:
    """The same of keys that may be codes, some at a time; those at 0 stay as coded."""
    if not isinstance(k, Codes):
        return turned(k, by, spec)
    slots = by.shape[2]
    size = min(TILE, slots)

    def step(n: Array, out: Codes) -> Codes:
        start = jnp.minimum(n * size, slots - size)

        def cut(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, start, size, 2)

        old, how = jax.tree.map(cut, k), cut(by)
        new = k.encode(turned(old.astype(jnp.float32), how, spec))
        return jax.tree.map(
            lambda whole, x, y: lax.dynamic_update_slice_in_dim(
                whole, jnp.where(how[..., None] == 0, x, y), start, 2
            ),
            out,
            old,
            new,
        )

    return lax.fori_loop(0, -(-slots // size), step, k)


def _filled(kv: KV) -> Int[Array, " B"]:
    """Places of each row that hold a token."""
    return jnp.sum(kv.pos[:, 0] >= 0, -1, dtype=jnp.int32)
