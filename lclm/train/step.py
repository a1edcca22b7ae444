"""One optimizer step as a pure function of state and batch."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from lclm import objectives, sharding
from lclm.config import ModelConfig
from lclm.models.trunk import Trunk
from lclm.objectives.base import Objective, Share
from lclm.train.config import TrainConfig
from lclm.train.layout import Layout, make_layout
from lclm.train.optim import global_norm, make_optimizer
from lclm.train.state import (
    OWN,
    TrainState,
    is_finite,
    model_params,
    own_params,
    training_config,
)
from lclm.typing import Array, Batch, Params

Metrics = dict[str, Array]
Specs = dict[str, P]


@dataclass(frozen=True)
class Step:
    """What stays the same from step to step: `Step(...)(state, frozen, batch)`.

    A batch holds the arrays of the whole step; its rows are split into
    `run.accumulate` parts whose gradients add up to exactly those of one batch
    (sums of losses over sums of weights, not means of means). With a layout, loss and
    gradients are one `shard_map` over its mesh, the update is not.
    """

    run: TrainConfig
    trunk: Trunk
    objective: Objective
    tx: optax.GradientTransformation
    layout: Layout | None = None

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
        if self.layout is None:
            return self._part(params, frozen, batch)
        split, kept = self.layout.specs(params), self.layout.specs(frozen)
        fn = jax.shard_map(
            lambda *args: self._part(*args, split | kept),
            mesh=self.layout.mesh,
            in_specs=(split, kept, sharding.BATCH),
            out_specs=(P(), split),
            check_vma=False,
        )
        return fn(params, frozen, self.layout.in_order(batch))

    def _part(
        self, params: Params, frozen: Params, batch: Batch, specs: Specs | None = None
    ) -> tuple[Metrics, Params]:
        """The whole, from this device's part of the batch and of the parameters."""
        shards = sharding.axis_size(*sharding.TOKENS)
        weight = sharding.total(self.objective.weight(batch), *sharding.TOKENS)
        share = Share(jnp.maximum(weight, 1e-6), self.run.accumulate * shards)
        told, grads = self._summed(params, frozen, batch, share, specs)
        told = sharding.total(told, *sharding.TOKENS)
        for path in grads if specs else ():
            over = sharding.unsplit(specs[path])
            grads[path] = sharding.total(grads[path], *over)
        return told | {"weight": weight}, grads

    def _summed(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        share: Share,
        specs: Specs | None,
    ) -> tuple[Metrics, Params]:
        """Sums over microbatches."""
        parts = self.run.accumulate
        one = jax.value_and_grad(functools.partial(self._loss, specs), has_aux=True)
        if parts == 1:
            (_, told), grads = one(params, frozen, batch, share)
            return told, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

        def add(sums: Any, part: Batch) -> tuple[Any, None]:
            (_, told), grads = one(params, frozen, part, share)
            return jax.tree.map(jnp.add, sums, (told, grads)), None

        micro = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        first = jax.tree.map(lambda x: x[0], micro)
        (_, told), grads = jax.eval_shape(lambda: one(params, frozen, first, share))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), (told, grads))
        return lax.scan(add, zeros, micro)[0]

    def _loss(
        self,
        specs: Specs | None,
        params: Params,
        frozen: Params,
        batch: Batch,
        share: Share,
    ) -> tuple[Array, Metrics]:
        """This device's share of the loss, such that those of all devices add up."""
        flat = params | frozen
        if specs is not None:
            flat = sharding.as_split(flat, specs)
        tree = model_params(self.run, flat)
        own = own_params(flat)
        if own:
            tree["objective"] = own
        loss, told = self.objective.loss(self.trunk, tree, batch, share)
        copies = sharding.axis_size(*sharding.COPIES)
        return loss / copies, told | {"loss": loss}

    def _project(self, params: Params) -> Params:
        own = self.objective.project(own_params(params))
        return params | {OWN + path: leaf for path, leaf in own.items()}


def make_step(run: TrainConfig, config: ModelConfig, devices: Any = None) -> Step:
    """The step of a run that starts from a model of this description.

    `devices` are those of its mesh, all there are where None. Raises LclmError for
    whatever does not fit: objective, rows, heads, layers.
    """
    config = training_config(config, run.model, run.length)
    objective = objectives.make(run.objective)
    objective.check(config, run.length)
    layout = make_layout(run, config, devices)
    context = None if layout is None else layout.context
    form = (run.scan, run.remat, run.loss_chunk, context)
    trunk = Trunk(config, jnp.dtype(run.compute), *form)
    tx = make_optimizer(run.optimizer, run.steps)
    return Step(run, trunk, objective, tx, layout)


def _select(good: Array, new: Any, old: Any) -> Any:
    """`new` where `good`, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
