"""The axis letters, once.

B batch, T query time, S key time, D model, N query heads, K kv heads, G = N / K,
H head, F feed-forward, E experts, V vocabulary, P SSM state, C cache slots.
"""

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int

Tokens = Int[Array, "B T"]
Positions = Int[Array, "B T"]
Activations = Float[Array, "B T D"]
Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]
Params = dict[str, Any]
# tokens, targets, positions, segments: int32 [B, T]; weights: float32 [B, T].
Batch = dict[str, Any]
Leaf = Any  # an array, or what stands for one while a state tree is mapped over

__all__ = [
    "Activations",
    "Array",
    "Batch",
    "Bool",
    "Float",
    "Int",
    "Keys",
    "Leaf",
    "Params",
    "Positions",
    "Queries",
    "Tokens",
]
