"""Cross-entropy of the next token: pretraining, continued training, fine-tuning."""

from dataclasses import dataclass

import jax.numpy as jnp

from lclm.config import ModelConfig
from lclm.errors import LclmError
from lclm.models.trunk import Trunk
from lclm.objectives.base import Share
from lclm.typing import Array, Batch, Float, Params


@dataclass(frozen=True)
class NextToken:
    """Mean loss over weighted targets, plus `balance` times the experts' balance loss.

    `balance` is 0.001 in Jamba and 0.01 to 0.02 in Mixtral (router_aux_loss_coef).
    sink=1 puts the model's BOS token in place of the first token of every document: a
    learned sink token (arXiv 2309.17453, section 3.3), to be put first in use as well.
    """

    balance: float = 0.01
    sink: int = 0

    def check(self, config: ModelConfig, length: int) -> None:
        """Raise LclmError where the model has no BOS token for a sink."""
        if self.sink and config.bos is None:
            raise LclmError("next_token:sink=1 over a model without a BOS token")

    def init(self, config: ModelConfig, key: Array) -> Params:
        """Nothing of its own."""
        return {}

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """Weights of the targets added up."""
        return jnp.sum(batch["weights"])

    def loss(
        self, trunk: Trunk, params: Params, batch: Batch, share: Share
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Share of the mean loss in nats a token."""
        if self.sink:
            first = batch["positions"] == 0
            tokens = jnp.where(first, trunk.config.bos, batch["tokens"])
            batch = batch | {"tokens": tokens}
        hidden, uneven = trunk.hidden(params, batch)
        nats = trunk.weighted_nll(params, hidden, batch) / share.weight
        told = {"nll": nats}
        if not trunk.routed:
            return nats, told
        told["balance"] = uneven / share.parts
        return nats + self.balance * told["balance"], told

    def project(self, params: Params) -> Params:
        """Free parameters."""
        return params
