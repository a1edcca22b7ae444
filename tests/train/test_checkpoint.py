"""Laws of checkpoints: nothing is lost but the steps since the last good one."""

import dataclasses
import functools
import json
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.data.batch import make_batch
from lclm.errors import LclmError
from lclm.models.decoder import init_params
from lclm.models.lora import LoraSpec
from lclm.train import checkpoint
from lclm.train.checkpoint import Store
from lclm.train.config import Checkpoints, ModelSpec, TrainConfig, train_config
from lclm.train.loop import Trainer
from lclm.train.records import read_journal
from tests.tiny import lively, tiny_config, tokens

CONFIG = tiny_config()
PARAMS = lively(init_params(CONFIG, jax.random.key(0)))
RUN = train_config(
    dict(
        name="tiny",
        model=dict(source="tiny"),
        data=dict(source="kjv"),
        steps=6,
        batch=2,
        length=16,
        compute="float32",
        log_every=1,
        optimizer=dict(lr=1e-2),
        checkpoints=dict(every=2),
    )
)
LORA = dataclasses.replace(RUN, model=ModelSpec("tiny", lora=LoraSpec(rank=2)))
TIMES = ("seconds", "tokens_per_second", "tflops", "mfu")


class Counted:
    """Batches that are a function of their number."""

    def __init__(self):
        self.next = 0

    def __next__(self):
        self.next += 1
        return make_batch(tokens(2, 17, seed=self.next))

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


@functools.cache
def compiled(run: TrainConfig):
    return Trainer(run, CONFIG, PARAMS).step


def trainer(run: TrainConfig = RUN, params=PARAMS) -> Trainer:
    """A fresh trainer; the compiled step is shared, as its arguments are pure."""
    made = Trainer(run, CONFIG, params)
    made.step = compiled(dataclasses.replace(run, checkpoints=RUN.checkpoints))
    return made


def store(folder, made: Trainer, warned: list | None = None) -> Store:
    told = [] if warned is None else warned
    kept = made.run.checkpoints
    return Store(folder / "checkpoints", kept, about=made.about(), warn=told.append)


def sit(folder, run: TrainConfig = RUN, *, until: int | None = None, warned=None):
    """One process of a run: resume, step (to `until` and die), state and records."""
    made, data = trainer(run), Counted()
    held = store(folder, made, warned)
    made.resume(held, data)

    def die(step, record):
        if until is not None and step >= until:
            raise Killed

    try:
        made.fit(data, folder, die, store=held)
    except Killed:
        held.wait()
    return made


class Killed(Exception):
    pass


def same(a, b) -> None:
    left, right = checkpoint.named(a), checkpoint.named(b)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[name], err_msg=name)


def lines(folder) -> list:
    found = read_journal(folder / "metrics.jsonl")
    return [
        {k: v for k, v in r.items() if k not in TIMES}
        for r in found
        if r.get("event") != "start"
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return sit(folder).state, lines(folder)


@pytest.mark.parametrize("until", [1, 3, 5])
def test_a_resumed_run_is_bit_identical_to_one_never_stopped(tmp_path, whole, until):
    sit(tmp_path, until=until)
    again = sit(tmp_path)
    state, records = whole
    same(again.state, state)
    assert lines(tmp_path) == records


def test_only_the_newest_and_the_chosen_checkpoints_are_kept(tmp_path):
    kept = Checkpoints(every=1, keep=2, keep_every=3)
    sit(tmp_path, dataclasses.replace(RUN, checkpoints=kept))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["3", "5", "6"]


def damage_truncated(place):
    biggest = max(place.rglob("d/*"), key=lambda p: p.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:100])


def damage_one_byte(place):
    biggest = max(place.rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(biggest.read_bytes())
    data[len(data) // 2] ^= 1
    biggest.write_bytes(data)


def damage_lost_file(place):
    (place / "_CHECKPOINT_METADATA").unlink()


def damage_files_json(place):
    (place / checkpoint.FILES).write_text("{")


def damage_before_checksums(place):
    damage_truncated(place)
    (place / checkpoint.FILES).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncated,
        damage_one_byte,
        damage_lost_file,
        damage_files_json,
        damage_before_checksums,
    ],
)
def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path, whole, damage):
    sit(tmp_path, until=5)
    damage(tmp_path / "checkpoints" / "4")
    warned: list[str] = []
    made = trainer()
    held = store(tmp_path, made, warned)
    assert made.resume(held, Counted()) == 2
    assert len(warned) == 1 and "checkpoints/4 is damaged" in warned[0]
    same(sit(tmp_path).state, whole[0])
    assert lines(tmp_path) == whole[1]


def test_with_every_checkpoint_damaged_a_run_begins_anew(tmp_path, whole):
    sit(tmp_path, until=5)
    for step in ("2", "4"):
        damage_truncated(tmp_path / "checkpoints" / step)
    same(sit(tmp_path).state, whole[0])


@pytest.fixture
def full_disk():
    """Files stop growing at 20 kB: what a write to a full disk sees."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_loses_nothing_but_that_checkpoint(tmp_path, whole, full_disk):
    warned: list[str] = []
    made = sit(tmp_path, warned=warned)
    same(made.state, whole[0])
    assert len(warned) == 3 and "step 2 could not be written" in warned[0]
    full_disk()
    same(sit(tmp_path, warned=warned).state, whole[0])
    assert len(warned) == 3 and lines(tmp_path) == whole[1]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "6"}


def test_frozen_parameters_are_not_in_a_checkpoint(tmp_path):
    made = sit(tmp_path, LORA)
    held = checkpoint.ocp.metadata(tmp_path / "checkpoints" / "6").metadata
    assert held.keys() == checkpoint.named(made.state).keys()
    assert all("lora" in name or len(m.shape) == 0 for name, m in held.items())


def test_another_base_under_the_same_adapters_is_refused(tmp_path):
    sit(tmp_path, LORA)
    other = jax.tree.map(lambda x: x + 1, PARAMS)
    made = Trainer(LORA, CONFIG, other)
    with pytest.raises(LclmError, match="frozen parameters differ"):
        made.resume(store(tmp_path, made), Counted())


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path):
    sit(tmp_path, LORA)
    run = dataclasses.replace(LORA, model=ModelSpec("tiny", lora=LoraSpec(rank=3)))
    made = Trainer(run, CONFIG, PARAMS)
    with pytest.raises(LclmError, match=r"lora_down is \(2, 2, 32\), expected"):
        made.resume(store(tmp_path, made), Counted())


def test_a_disk_too_small_is_found_before_the_first_step(tmp_path):
    made = trainer()
    need = made.disk(store(tmp_path, made))
    assert need >= 3 * checkpoint.state_bytes(made.state)
    with pytest.raises(LclmError, match="GB free"):
        checkpoint.check_disk(tmp_path, need=1 << 60)


def test_a_second_stage_takes_parameters_and_moments_and_counts_anew(tmp_path):
    first = sit(tmp_path)
    (tmp_path / "model").mkdir()
    for clip in (1.0, None):
        optimizer = dataclasses.replace(RUN.optimizer, lr=1e-3, clip_norm=clip)
        made = Trainer(dataclasses.replace(RUN, optimizer=optimizer), CONFIG, PARAMS)
        fresh = checkpoint.named(jax.tree.map(jnp.copy, made.state))
        made.begin_from(tmp_path, optimizer=True)
        same(made.state.params, first.state.params)
        assert int(made.state.step) == 0
        now, then = checkpoint.named(made.state), checkpoint.named(first.state)
        for kind in (".mu.", ".nu."):
            (a,) = (v for n, v in now.items() if kind in n and "embed" in n)
            (b,) = (v for n, v in then.items() if kind in n and "embed" in n)
            np.testing.assert_array_equal(a, b)
        counts = sorted(int(v) for n, v in now.items() if n.endswith("count"))
        assert counts == [0, 6]
        assert now.keys() == fresh.keys()


def test_without_the_optimizer_a_second_stage_has_fresh_moments(tmp_path):
    sit(tmp_path)
    (tmp_path / "model").mkdir()
    made = trainer()
    made.begin_from(tmp_path, optimizer=False)
    assert all(
        not np.any(v) for n, v in checkpoint.named(made.state).items() if ".mu." in n
    )


def test_a_stage_cannot_start_from_an_unfinished_run(tmp_path):
    sit(tmp_path, until=3)
    with pytest.raises(LclmError, match="no finished run"):
        trainer().begin_from(tmp_path, optimizer=False)
    with pytest.raises(LclmError, match="is not there"):
        trainer().begin_from(tmp_path / "x", optimizer=False)


MESH = """
import jax, json, sys, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pathlib import Path
from lclm.train.checkpoint import Store
from lclm.train.config import Checkpoints
from lclm.train.state import TrainState
def state(fill):
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    w = np.arange(128, dtype=np.float32).reshape(16, 8) * fill
    one = put(np.int32(5 * fill), P())
    return TrainState(one, one, {"a/w": put(w, P("fsdp"))}, (put(w, P(None, "fsdp")),))
store = Store(Path("FOLDER"), Checkpoints(), about={}, warn=print)
if "DO" == "save":
    store.save(state(1), {"next": 3}); store.wait()
else:
    got, about = store.restore(state(0))
    want = state(1)
    assert about["data"] == {"next": 3}, about
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
        np.testing.assert_array_equal(a, b)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8)])
def test_a_checkpoint_restores_onto_another_mesh(tmp_path, on_devices, before, after):
    source = MESH.replace("FOLDER", str(tmp_path / "c"))
    on_devices(source.replace("DO", "save"), count=before)
    on_devices(source.replace("DO", "restore"), count=after)


def test_a_config_of_checkpoints_that_cannot_be_is_refused():
    with pytest.raises(LclmError, match="keep is 0"):
        train_config({**RUN.to_json(), "checkpoints": {"keep": 0}})
    assert json.loads(json.dumps(RUN.to_json()))["checkpoints"]["every"] == 2
