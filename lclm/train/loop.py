"""The loop: batches in, steps, records and checkpoints out."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lclm import processes
from lclm.config import ModelConfig
from lclm.data.pipeline import Batches
from lclm.errors import LclmError
from lclm.train.checkpoint import Store, fingerprint, state_bytes
from lclm.train.config import TrainConfig
from lclm.train.holdout import Holdout
from lclm.train.metrics import CONVENTION, mean_step, peak_flops
from lclm.train.optim import make_schedule
from lclm.train.profile import Profile
from lclm.train.records import Records, Unrecorded
from lclm.train.stages import begin_from
from lclm.train.state import TrainState, count, start
from lclm.train.step import Metrics, make_step
from lclm.train.stop import Stop, Stopped
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
        self.base = config
        self.stepper = step = make_step(run, config)
        self.trunk, self.layout = step.trunk, step.layout
        self.config = step.trunk.config
        self.schedule = make_schedule(run.optimizer, run.steps)
        self.state, self.frozen = start(
            run, self.config, params, step.objective, step.tx
        )
        self._sum = fingerprint(params)
        where = None
        if self.layout is not None:
            self.state = self.layout.place(self.state)
            self.frozen = self.layout.place(self.frozen)
            where = (self.layout.shardings(self.state), None)
        self.step = jax.jit(
            self.stepper.__call__, donate_argnums=0, out_shardings=where
        )
        self.tokens, self.flops = mean_step(self.config, run)

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of its run: the config, and the frozen base if any."""
        return {"run": self.run.to_json(), "base": self._base()}

    def _base(self) -> dict[str, str] | None:
        if not self.frozen:
            return None
        return {"source": self.run.model.source, "sum": self._sum}

    def resume(self, store: Store, batches: Batches) -> int:
        """Go on from the newest good checkpoint; the steps that are done, 0 for none.

        Raises:
          LclmError: that checkpoint is of another shape or base.
        """
        found = store.restore(self.state)
        if found is None:
            return 0
        self.state, about = found
        batches.set_state(about["data"])
        return int(self.state.step)

    def begin_from(self, folder: Path, *, optimizer: bool) -> None:
        """Take the trained parameters of a finished run, and its moments if told."""
        about = self.about()
        self.state = begin_from(folder, self.state, about=about, optimizer=optimizer)

    def disk(self, store: Store) -> int:
        """Bytes that checkpoints (one being written) and the model still need."""
        kept = store.spec.keep + 1 - len(store.steps())
        flat = self.frozen | self.state.params
        model = sum(leaf.nbytes for leaf in flat.values())
        return max(kept, 1) * state_bytes(self.state) + model

    def fit(
        self,
        batches: Batches,
        folder: Path,
        observe: Observe,
        *,
        store: Store | None = None,
        holdout: Batches | None = None,
        until: int | None = None,
    ) -> Trained:
        """Run the steps that are left and record them in `folder`.

        Checkpoints go to `store`, one at the end included. SIGTERM and Ctrl-C end the
        run after the step it is in; `until` ends it after that step.

        Raises:
          Stopped: a signal or `until` ended it; the state is in a checkpoint.
          LclmError: no step had a finite loss.
        """
        began = time.perf_counter()
        start, writes = int(self.state.step), processes.first()
        with (
            Stop() as stop,
            Records(folder, start=start) if writes else Unrecorded() as records,
            Profile(self.run.profile if writes else (), folder / "profile") as profile,
        ):
            sitting = _Sitting(self, records, observe, store, holdout)
            sitting.run(batches, profile, stop, until or self.run.steps)
        done, skipped = int(self.state.step), int(self.state.skipped)
        if done < self.run.steps:
            raise Stopped(stop.asked, done)
        if skipped == self.run.steps:
            raise LclmError(
                f"all {self.run.steps} steps had a loss or gradient that is not "
                "finite: lower optimizer.lr, or train in compute='float32'"
            )
        flat = self.frozen | self.state.params
        return Trained(flat, self.state, time.perf_counter() - began)

    def place(self, batch: Batch) -> Batch:
        """A batch on the devices."""
        if self.layout is not None:
            return self.layout.place_batch(batch, self.run.batch)
        return {name: jax.device_put(array) for name, array in batch.items()}

    def head(self, done: int) -> dict[str, Any]:
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

    def speed(self, done: int, seconds: float) -> dict[str, float]:
        """What follows from the seconds a step took."""
        rate = self.flops / seconds
        found = {
            "lr": float(self.schedule(done - 1)),
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "tflops": rate / 1e12,
        }
        peak = peak_flops(jax.devices()[0])
        if peak:
            found["mfu"] = rate / (peak * jax.device_count())
        return found


class _Sitting:
    """The steps of one process, and what is done between them.

    The device never waits for a record: a logged step is read after the next one has
    been handed over. Evaluation and checkpoints are not counted into a step's time.
    """

    def __init__(
        self,
        trainer: Trainer,
        records: Records | Unrecorded,
        observe: Observe,
        store: Store | None,
        holdout: Batches | None,
    ):
        self.trainer, self.records, self.observe = trainer, records, observe
        self.store, self.done = store, int(trainer.state.step)
        self.look = None
        if holdout is not None:
            made = trainer
            self.look = Holdout(made.run, made.base, made.trunk, holdout)
        self._unread: tuple[int, Metrics] | None = None
        self._since, self._mark = self.done, time.perf_counter()

    def run(self, batches: Batches, profile: Profile, stop: Stop, until: int) -> None:
        """Step until the end, `until` or a signal; the last state is saved."""
        made, run = self.trainer, self.trainer.run
        self.records.write(made.head(self.done))
        if self.done == 0:
            self._look()
            self._mark = time.perf_counter()
        while self.done < min(run.steps, until) and not self._ends(stop):
            batch = made.place(next(batches))
            profile.before(self.done + 1)
            with jax.transfer_guard("disallow"):
                made.state, told = made.step(made.state, made.frozen, batch)
            self.done += 1
            profile.after(self.done, made.state)
            self._read()
            if self.done % run.log_every == 0 or self.done in (1, run.steps):
                self._unread = self.done, told
            self._between(batches)
        self._read()
        if self.store is not None:
            self.store.save(made.state, batches.get_state())
            self.store.wait()

    def _ends(self, stop: Stop) -> bool:
        """Whether a signal came; several processes ask each other at logged steps."""
        if jax.process_count() > 1 and self.done % self.trainer.run.log_every == 0:
            stop.asked = processes.largest(stop.asked or 0) or None
            return stop.asked is not None
        return jax.process_count() == 1 and stop.asked is not None

    def _between(self, batches: Batches) -> None:
        """Evaluation and checkpoints that are due, their time taken out."""
        made, run = self.trainer, self.trainer.run
        last = self.done == run.steps
        looks = run.eval_every and (self.done % run.eval_every == 0 or last)
        saves = self.store is not None and self.store.due(self.done) and not last
        if not (looks and self.look) and not saves:
            return
        self._read()
        jax.block_until_ready(made.state)
        began = time.perf_counter()
        if looks:
            self._look()
        if saves:
            self.records.sync()
            self.store.save(made.state, batches.get_state())
        self._mark += time.perf_counter() - began

    def _look(self) -> None:
        """Record the loss on text that is not trained on, where there is one."""
        if self.look is None:
            return
        made, began = self.trainer, time.perf_counter()
        found = self.look(made.state.params, made.frozen, made.place)
        seconds = time.perf_counter() - began
        event = {"event": "eval", "step": self.done, **found, "seconds": seconds}
        self.records.write(event)

    def _read(self) -> None:
        """Fetch, record and show the logged step that is not yet read."""
        if self._unread is None:
            return
        (step, told), self._unread = self._unread, None
        record = {k: float(v) for k, v in jax.device_get(told).items()}
        now = time.perf_counter()
        seconds = (now - self._mark) / (step - self._since)
        self._mark, self._since = now, step
        record |= self.trainer.speed(step, seconds)
        self.records.write({"step": step} | record)
        self.observe(step, record)
