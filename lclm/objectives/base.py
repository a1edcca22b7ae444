"""What every objective is: a loss over a batch that adds up over any split of it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lclm.config import AttentionSpec, ModelConfig
from lclm.errors import LclmError
from lclm.models.trunk import Trunk
from lclm.typing import Array, Batch, Float, Params


@dataclass(frozen=True)
class Share:
    """How a part of a step relates to the whole of it.

    weight: the weights of the whole step added up, over all microbatches and devices.
    parts: the number of those parts. A loss divided by `weight` (means over tokens) or
    by `parts` (means over batches) adds up to the step's loss, however it was split.
    """

    weight: Array
    parts: int = 1


@runtime_checkable
class Objective(Protocol):
    """A frozen dataclass of settings. Parameters are flat dictionaries by path.

    Parameters of its own (gates, heads) come from `init` under the path "objective/".
    """

    def check(self, config: ModelConfig, length: int) -> None:
        """Raise LclmError where the model or the length does not suit."""
        ...

    def init(self, config: ModelConfig, key: Array) -> Params:
        """Parameters of its own, {} for none."""
        ...

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """What the loss of this part of the batch is weighted with."""
        ...

    def loss(
        self, trunk: Trunk, params: Params, batch: Batch, share: Share
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """This part's share of the loss, and shares of what is logged beside it."""
        ...

    def project(self, params: Params) -> Params:
        """Trained parameters brought back into their range after an update."""
        ...


def full_attention(config: ModelConfig, name: str) -> tuple[int, AttentionSpec]:
    """The number of attention layers, and the first one's spec.

    Raises LclmError unless there is one, all see everything, and their heads agree.
    """
    specs = [s.mixer for s in config.layers if isinstance(s.mixer, AttentionSpec)]
    if not specs:
        raise LclmError(f"objective {name}: the model has no attention layer")
    first = specs[0]
    for spec in specs:
        if spec.window is not None or spec.static:
            raise LclmError(
                f"objective {name} over a layer with window={spec.window}, "
                f"pattern={spec.pattern!r}: it needs full attention in every layer"
            )
        shape = (spec.heads, spec.kv_heads, spec.head_dim)
        if shape != (first.heads, first.kv_heads, first.head_dim):
            raise LclmError(f"objective {name}: attention layers differ in their heads")
    return len(specs), first
