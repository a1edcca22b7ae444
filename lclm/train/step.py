"""One optimizer step as a pure function of state and batch."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lclm.models.trunk import Trunk
from lclm.objectives.base import Objective, Share
from lclm.train.config import TrainConfig
from lclm.train.optim import global_norm
from lclm.train.state import OWN, TrainState, is_finite, model_params, own_params
from lclm.typing import Array, Batch, Params

Metrics = dict[str, Array]


@dataclass(frozen=True)
class Step:
    """What stays the same from step to step: `Step(...)(state, frozen, batch)`.

    A batch holds the arrays of the whole step; its rows are split into
    `run.accumulate` parts whose gradients add up to exactly those of one batch
    (sums of losses over sums of weights, not means of means).
    """

    run: TrainConfig
    trunk: Trunk
    objective: Objective
    tx: optax.GradientTransformation

    def __call__(
        self, state: TrainState, frozen: Params, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        """The next state, and loss, gradient norm and what the objective tells.

        A loss or gradient that is not finite leaves the parameters and the optimizer as
        they were; `skipped` counts those steps.
        """
        told, grads = self.gradients(state.params, frozen, batch)
        norm = global_norm(grads)
        good = is_finite(told["loss"], norm)
        grads = {p: g.astype(state.params[p].dtype) for p, g in grads.items()}
        updates, opt = self.tx.update(grads, state.opt, state.params)
        params = self._project(optax.apply_updates(state.params, updates))
        skipped = state.skipped + jnp.where(good, 0, 1).astype(jnp.int32)
        state = TrainState(
            state.step + 1,
            skipped,
            _select(good, params, state.params),
            _select(good, opt, state.opt),
        )
        return state, told | {"grad_norm": norm, "skipped": skipped}

    def gradients(
        self, params: Params, frozen: Params, batch: Batch
    ) -> tuple[Metrics, Params]:
        """Loss and companions, and float32 gradients of `params`."""
        parts = self.run.accumulate
        total = self.objective.weight(batch)
        share = Share(jnp.maximum(total, 1e-6), parts)
        one = jax.value_and_grad(self._loss, has_aux=True)
        if parts == 1:
            (loss, told), grads = one(params, frozen, batch, share)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            return told | {"loss": loss, "weight": total}, grads

        def add(sums: Any, part: Batch) -> tuple[Any, None]:
            (loss, told), grads = one(params, frozen, part, share)
            return jax.tree.map(jnp.add, sums, (told | {"loss": loss}, grads)), None

        micro = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(lambda: one(params, frozen, first, share))
        (loss, told), grads = shapes
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, jnp.float32), (told | {"loss": loss}, grads)
        )
        (told, grads), _ = lax.scan(add, zeros, micro)
        return told | {"weight": total}, grads

    def _loss(
        self, params: Params, frozen: Params, batch: Batch, share: Share
    ) -> tuple[Array, Metrics]:
        flat = params | frozen
        tree = model_params(self.run, flat)
        own = own_params(flat)
        if own:
            tree["objective"] = own
        return self.objective.loss(self.trunk, tree, batch, share)

    def _project(self, params: Params) -> Params:
        own = self.objective.project(own_params(params))
        return params | {OWN + path: leaf for path, leaf in own.items()}


def _select(good: Array, new: Any, old: Any) -> Any:
    """`new` where `good`, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
