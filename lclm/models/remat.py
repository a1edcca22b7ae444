"""What the backward pass keeps and what it computes again, by name."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from lclm.errors import unknown

# Arrays that the blocks and the attention operation name with `checkpoint_name`.
ATTENTION = ("attention_out", "attention_lse")
PRESETS = {"none": (), "full": (), "attention": ATTENTION}


@dataclass(frozen=True)
class RematSpec:
    """A preset of what is kept between the passes.

    "none" keeps everything; "full" keeps the input of each layer (of each group where
    groups are scanned) and computes the rest again; "attention" keeps attention's
    outputs and log-sum-exp beside it, whose recomputation would cost T^2.
    """

    kind: str = "none"

    def __post_init__(self):
        if self.kind not in PRESETS:
            raise unknown("remat preset", self.kind, PRESETS)

    def wrap(self, module: type[nn.Module], **options: Any) -> type[nn.Module]:
        """The module class with this rule around its call."""
        if self.kind == "none":
            return module
        save = jax.checkpoint_policies.save_only_these_names(*PRESETS[self.kind])
        return nn.remat(module, policy=save, **options)


NO_REMAT = RematSpec()
