"""The loop: batches in, steps, records and checkpoints out."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lclm import objectives
from lclm.config import ModelConfig
from lclm.data.pipeline import Batches
from lclm.errors import LclmError
from lclm.models.trunk import Trunk
from lclm.train.config import TrainConfig
from lclm.train.metrics import CONVENTION, Journal, peak_flops, step_flops
from lclm.train.optim import make_optimizer, make_schedule
from lclm.train.state import TrainState, count, start, training_config
from lclm.train.step import Step
from lclm.typing import Batch, Params

Observe = Callable[[int, dict[str, float]], None]
"""Called after logged steps with (steps done, what was measured)."""


@dataclass(frozen=True)
class Trained:
    """Where a run ended: every parameter by path, and the seconds it took."""

    params: Params
    state: TrainState
    seconds: float


class Trainer:
    """A run made ready: everything that can be wrong is found before the first step."""

    def __init__(self, run: TrainConfig, config: ModelConfig, params: Params):
        self.run = run
        self.config = training_config(config, run.model, run.length)
        self.objective = objectives.make(run.objective)
        self.objective.check(self.config, run.length)
        dtype = jax.numpy.dtype(run.compute)
        self.trunk = Trunk(self.config, dtype, run.scan, run.remat, run.loss_chunk)
        self.schedule = make_schedule(run.optimizer, run.steps)
        tx = make_optimizer(run.optimizer, run.steps)
        self.state, self.frozen = start(run, self.config, params, self.objective, tx)
        self.stepper = Step(run, self.trunk, self.objective, tx)
        self.step = jax.jit(self.stepper.__call__, donate_argnums=0)
        self.flops = step_flops(self.config, run.batch, run.length)

    def fit(self, batches: Batches, folder: Path, observe: Observe) -> Trained:
        """Run the steps that are left and write `metrics.jsonl` in `folder`."""
        run, state = self.run, self.state
        done, began = int(state.step), time.perf_counter()
        journal = Journal(folder / "metrics.jsonl", start=done)
        journal.write(self._head(done))
        mark, since = time.perf_counter(), done
        while done < run.steps:
            batch = self._place(next(batches))
            with jax.transfer_guard("disallow"):
                state, told = self.step(state, self.frozen, batch)
            done += 1
            if done % run.log_every and done not in (1, run.steps):
                continue
            record = {k: float(v) for k, v in jax.device_get(told).items()}
            now = time.perf_counter()
            seconds, mark = (now - mark) / (done - since), now
            since = done
            record = {"step": done, **record, **self._speed(done, seconds)}
            journal.write(record)
            observe(done, record)
        journal.close()
        self.state = state
        if int(state.skipped) == run.steps:
            raise LclmError(
                f"all {run.steps} steps had a loss or gradient that is not finite: "
                "lower optimizer.lr, or train in compute='float32'"
            )
        flat = self.frozen | state.params
        return Trained(flat, state, time.perf_counter() - began)

    def _place(self, batch: Batch) -> Batch:
        return {name: jax.device_put(array) for name, array in batch.items()}

    def _head(self, done: int) -> dict[str, Any]:
        """The first record of a sitting: what runs, on what."""
        device = jax.devices()[0]
        return {
            "event": "start",
            "step": done,
            "name": self.run.name,
            "trained": count(self.state.params),
            "frozen": count(self.frozen),
            "flops_a_step": self.flops,
            "flops_convention": CONVENTION,
            "devices": f"{jax.device_count()} x {device.device_kind}",
            "jax": jax.__version__,
        }

    def _speed(self, done: int, seconds: float) -> dict[str, float]:
        run, rate = self.run, self.flops / seconds
        found = {
            "lr": float(self.schedule(done - 1)),
            "seconds": seconds,
            "tokens_per_second": run.batch * run.length / seconds,
            "tflops": rate / 1e12,
        }
        peak = peak_flops(jax.devices()[0])
        if peak:
            found["mfu"] = rate / (peak * jax.device_count())
        return found
