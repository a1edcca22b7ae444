"""The cache policy protocol: what survives of the past, and at which positions.

Three numbers are kept apart. A token's *position* is its index in its row; its *slot*
is where the policy put it; the *valid* slots are those whose stored position is not -1.
A policy never calls the model: where it needs a forward pass of its own (a catalyst
prompt) it names an `Overflow` that the engine runs.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from lclm.config import AttentionSpec, ModelConfig
from lclm.errors import LclmError
from lclm.learned import Model
from lclm.ops import codes
from lclm.typing import Array, Float, Int, Leaf
from pallas_kernels.mask import Mask

if TYPE_CHECKING:
    from lclm.cache.step import Step


@dataclass(frozen=True)
class Layer:
    """Which layer a policy is asked about.

    `mask` is the whole mask of a spec with a static pattern, on positions, or None.
    `rank` counts the model's attention layers from 0, `layers` is how many there are;
    both are known to `over` and where caches are allocated or cut, not to `attend`.
    """

    index: int
    spec: AttentionSpec
    mask: Mask | None = None
    rank: int = 0
    layers: int = 1


def layers_of(config: ModelConfig) -> tuple[Layer, ...]:
    """Every attention layer of a model as cache policies know it."""
    found = [
        (i, s.mixer)
        for i, s in enumerate(config.layers)
        if isinstance(s.mixer, AttentionSpec)
    ]
    return tuple(
        Layer(i, mixer, rank=rank, layers=len(found))
        for rank, (i, mixer) in enumerate(found)
    )


@dataclass(frozen=True)
class HeadGroup:
    """kv heads that share one capacity (in tokens)."""

    heads: tuple[int, ...]
    capacity: int


@dataclass(frozen=True)
class Needs:
    """What a policy wants to see besides rotated keys and values.

    queries, keys: q and k before rotation. last: column sums of the attention
    probabilities of the last `last` queries of a call. nll: the loss of each token read
    or made, given to `observe` behind the call that holds it. params: a parameter
    pytree (retaining heads, gates).
    """

    queries: bool = False
    keys: bool = False
    last: int = 0
    nll: bool = False
    params: bool = False


@dataclass(frozen=True)
class Overflow:
    """What the engine does to rows that a call would fill beyond `kept`.

    It runs the model over `tokens` (not at all where empty) on caches that keep none of
    them, so each layer's `weigh` sees how they attend, then calls `compact`. Places for
    `tokens` count as taken: a row holds at most `kept` - len(tokens) of its own.
    `room` is the tokens that fit between two compactions. Other rows stay as they are.
    """

    room: int
    tokens: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heads:
    """One call's projections before rotation: q [B, T, N, H], k and v [B, T, K, H]."""

    q: Leaf
    k: Leaf
    v: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KV:
    """The slots of one head group: k and v [B, K, C, H], pos int32 [B, 1 or K, C].

    `pos` is -1 where a slot is empty. k and v are arrays or `lclm.ops.codes.Codes`.
    """

    k: Leaf
    v: Leaf
    pos: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """One layer's cache: head groups, and whatever else a policy carries by name."""

    groups: tuple[KV, ...]
    extra: dict[str, Leaf] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Evidence:
    """What `update` and `weigh` may look at; absent parts are None.

    mass_old [B, K, C], mass_new [B, K, T]: probability column sums of the last queries,
    summed over each kv head's query heads. queries, keys: before rotation.
    """

    mass_old: Leaf = None
    mass_new: Leaf = None
    queries: Leaf = None
    keys: Leaf = None


def empty(
    batch: int,
    heads: int,
    slots: int,
    size: int,
    dtype: Any,
    *,
    per_head: bool = False,
    bits: int = 0,
) -> KV:
    """Unwritten slots; with `bits`, codes with a scale per token and 32 channels."""
    shape = (batch, heads, slots, size)
    pos = jnp.full((batch, heads if per_head else 1, slots), -1, jnp.int32)
    if not bits:
        return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), pos)
    group = (1, codes.channels(size, bits))
    k, v = (codes.zeros(shape, bits, group, dtype) for _ in range(2))
    return KV(k, v, pos)


@dataclass(frozen=True)
class CachePolicy:
    """What every policy answers; `policies.Absolute` is the usual base to build on.

    `kept` is the most tokens per kv head that stay between calls (None: all of them).
    `exact_angles` asks for rotary angles that stay accurate at millions of positions.
    `compacts`: survivors are chosen at the ends of calls, so they depend on the chunk.
    `bits`: slots hold codes of 2, 4 or 8 bits (0: numbers). A call's own tokens are
    read as they are, those before it as stored; layers with a pattern hold numbers.
    `sizing`: the option, in tokens, that sets the bytes of a cache, if one does.
    `anywhere`: it has a meaning for models without attention layers too.
    """

    needs: ClassVar[Needs] = Needs()
    exact_angles: ClassVar[bool] = False
    per_head: ClassVar[bool] = False
    compacts: ClassVar[bool] = False
    recompute: ClassVar[bool] = False
    anywhere: ClassVar[bool] = False
    overflow: ClassVar[Overflow | None] = None
    sizing: ClassVar[str] = ""
    bits = 0  # not annotated: policies make it a field, in their own order

    @property
    def kept(self) -> int | None:
        """Tokens kept per kv head between calls; None keeps all."""
        return None

    def resolve(self, config: ModelConfig) -> tuple["CachePolicy", Any]:
        """The policy as it runs over one model, and the parameters it brings.

        Sessions, sizes and plans call this once, before anything is allocated. Here a
        policy reads what was made for a model and refuses what was made for another
        (LclmError): what decides shapes goes into the returned policy, which stays
        hashable and which a second `resolve` leaves as it is; arrays (`needs.params`)
        are returned beside it, one item per layer of `config.layers` (None where a
        layer has none), and reach `attend` as `step.policy[layer.index]`. A saved
        context stores the returned policy, and its arrays are resolved again.
        """
        return self, None

    def verify(self, config: ModelConfig, model: Model) -> None:
        """Refuse what was made for other weights of the same shape (LclmError).

        A session calls this before `fitted` and `resolve`, which know no weights.
        """

    def fitted(self, config: ModelConfig, dtype: Any, length: int) -> "CachePolicy":
        """The policy with sizes in tokens, for rows of `length` and keys of `dtype`.

        Whoever resolves a policy calls this first; it changes what was asked for in
        bytes (`lclm.cache.sized.Sized`) and nothing else.
        """
        return self

    def encoded(self, tokenizer: Any) -> "CachePolicy":
        """The policy with texts of its own as tokens (None: there is no tokenizer)."""
        return self

    def far(self, positions: Int[Array, "B T"]) -> Int[Array, "B T"] | None:
        """Second positions queries are also rotated to (`step.rotate(far=True)`)."""
        return None

    def capacity(self, layer: Layer, length: int) -> int:
        """Slots per kv head for rows of at most `length` tokens."""
        raise NotImplementedError

    def over(self, layer: Layer) -> "CachePolicy":
        """The policy of one layer: another one where this has no business there.

        Whoever runs a policy over a model asks this of each layer of `layers_of`, and
        gives what it says all that concerns the layer's cache.
        """
        return self

    def groups(self, layer: Layer, length: int) -> tuple[HeadGroup, ...]:
        """Head groups of one layer; one group of all kv heads unless overridden."""
        heads = tuple(range(layer.spec.kv_heads))
        return (HeadGroup(heads, self.capacity(layer, length)),)

    def init(self, layer: Layer, batch: int, length: int, dtype: Any) -> Cache:
        """Allocate one layer's cache."""
        bits = 0 if layer.spec.pattern else self.bits
        if bits and layer.spec.rope is not None and layer.spec.rope.dynamic:
            raise LclmError(
                f"bits={bits} with RoPE type {layer.spec.rope.kind!r}: keys are stored "
                "before a rotation that changes with the length; leave bits out, or "
                "use a fixed type such as yarn or linear"
            )
        return Cache(
            tuple(
                empty(
                    batch,
                    len(group.heads),
                    group.capacity,
                    layer.spec.head_dim,
                    dtype,
                    per_head=self.per_head,
                    bits=bits,
                )
                for group in self.groups(layer, length)
            )
        )

    def attend(
        self,
        cache: Cache,
        heads: Heads,
        step: "Step",
        layer: Layer,
        sink: Array | None = None,
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        """Read the slots and the call's own tokens: the output, and what is kept."""
        raise NotImplementedError

    def update(
        self, cache: Cache, new: KV, step: "Step", layer: Layer, evidence: Evidence
    ) -> Cache:
        """Write a call's tokens."""
        raise NotImplementedError

    def weigh(self, cache: Cache, evidence: Evidence, step: "Step") -> Cache:
        """Note how a catalyst attended; nothing is appended."""
        return cache

    def compact(self, cache: Cache, layer: Layer) -> Cache:
        """Make room after an overflow."""
        return cache

    def lasting(self, layer: Layer) -> tuple[int | str, ...]:
        """What of a layer's cache needs no copy to be gone back to (`serve.marks`).

        Numbers of head groups that calls only add tokens to, behind those they hold,
        and names of extras that follow from such tokens as they are written again.
        """
        return ()

    @property
    def settles(self) -> bool:
        """Whether the engine calls `settle` once, behind the whole prompt."""
        return False

    def settle(self, cache: Cache, layer: Layer, read: int) -> Cache:
        """What stays of prompts, of up to `read` tokens, that have been read whole."""
        return cache

    def settled(self, read: int) -> "CachePolicy":
        """The policy behind `settle`, where rows had up to `read` tokens."""
        return self

    def observe(
        self, cache: Cache, nll: Float[Array, "B T"], step_positions: Int[Array, "B T"]
    ) -> Cache:
        """Take the losses of a call's tokens, each given those before it (`needs.nll`).

        The first token of a row has none and is told 0; padding is at position -1.
        """
        return cache


def fit(
    policy: CachePolicy, config: ModelConfig, dtype: Any, length: int
) -> tuple[CachePolicy, Any]:
    """A policy as it runs over one model, and the parameters it brings (`resolve`).

    Raises:
      LclmError: nothing to keep or drop in a model without attention layers; a size in
        bytes below what is protected; gates or heads that were made for another model.
    """
    policy = policy.fitted(config, dtype, length)
    if not policy.anywhere and not layers_of(config):
        raise LclmError(
            f"{type(policy).__name__.lower()}: {config.family} has no attention "
            "layer whose tokens could be kept or dropped; use 'full'"
        )
    return policy.resolve(config)


def measured_bytes(caches: Any) -> int:
    """Bytes of the arrays that are really there."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
