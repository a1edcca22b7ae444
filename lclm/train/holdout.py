"""Loss on text that is not trained on, over the same batches every time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lclm.config import ModelConfig
from lclm.data.pipeline import Batches
from lclm.models.trunk import Trunk
from lclm.train.config import TrainConfig
from lclm.train.state import model_params, reshaped
from lclm.typing import Array, Batch, Params


class Holdout:
    """Mean loss in nats a token over `run.eval_batches` batches from one place.

    The model is taken as it will be used: a pattern that only training has is off.
    """

    def __init__(
        self, run: TrainConfig, config: ModelConfig, trunk: Trunk, batches: Batches
    ):
        used = reshaped(config, run.model)
        self._run, self._batches = run, batches
        self._trunk = dataclasses.replace(trunk, config=used, context=None)
        self._first = batches.get_state()
        self._sums = jax.jit(self._part)

    def __call__(self, params: Params, frozen: Params, place: Any) -> dict[str, float]:
        """`nll`, and the `tokens` it is the mean over; `place` puts a batch on devices.

        Sums are added in double precision in the batches' order.
        """
        self._batches.set_state(self._first)
        nats, tokens = 0.0, 0.0
        for _ in range(self._run.eval_batches):
            part = self._sums(params, frozen, place(next(self._batches)))
            a, b = jax.device_get(part)
            nats, tokens = nats + float(a), tokens + float(b)
        return {"nll": nats / max(tokens, 1e-6), "tokens": tokens}

    def _part(
        self, params: Params, frozen: Params, batch: Batch
    ) -> tuple[Array, Array]:
        tree = model_params(self._run, params | frozen)
        hidden, _ = self._trunk.hidden(tree, batch)
        nll = self._trunk.token_nll(tree, hidden, batch)
        return jnp.sum(nll * batch["weights"]), jnp.sum(batch["weights"])
