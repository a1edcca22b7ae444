"""What every objective is: a loss over a batch that adds up over any split of it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lclm.config import ModelConfig
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
