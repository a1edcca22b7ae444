"""Laws of several processes: they are one machine with all their devices."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from lclm.cli.train import run
from lclm.errors import LclmError
from lclm.hub import load_orbax
from lclm.models.presets import preset
from lclm.processes import join
from lclm.train.config import train_config
from lclm.train.layout import make_layout
from lclm.train.records import read_journal

ONE_OF_TWO = """
import sys
from lclm.processes import join
from lclm.train.config import train_config
assert join() == 2
import jax, numpy as np
assert jax.device_count() == 4 and len(jax.local_devices()) == 2
from tests.train.meshes import ROWS, batch, run_of, trainer

made = trainer("plain", run_of(mesh=dict(data=2, fsdp=2), accumulate=2))
half = ROWS // 2
own = slice(jax.process_index() * half, (jax.process_index() + 1) * half)
for rows in (batch(), {k: v[own] for k, v in batch().items()}):  # all rows, its own
    state, told = made.step(made.state, made.frozen, made.place(rows))
    print("loss", float(told["loss"]), float(told["grad_norm"]))
    made = trainer("plain", run_of(mesh=dict(data=2, fsdp=2), accumulate=2))
"""
TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(6000))
CONFIG = """
def get_config():
    return dict(
        name="tiny", data=dict(source="local:path=TEXT"), steps=4, batch=4, length=32,
        model=dict(source="tiny-bytes", scratch=True, tokenizer="bytes"), log_every=1,
        compute="float32", optimizer=dict(lr=3e-3, warmup=2), checkpoints=dict(every=2),
        sample=dict(prompt="ab", tokens=4),
        holdout=dict(source="local:path=TEXT"), eval_every=4, eval_batches=1,
    )
"""
ALONE = """
from tests.train.meshes import batch, run_of, trainer
made = trainer("plain", run_of())
state, told = made.step(made.state, made.frozen, made.place(batch()))
print("loss", float(told["loss"]), float(told["grad_norm"]))
"""


def losses(text: str) -> list[list[float]]:
    lines = [x.split() for x in text.splitlines() if x.startswith("loss")]
    return [[float(x) for x in line[1:]] for line in lines]


def in_two(*command: str, devices: int) -> list[str]:
    """What two processes of one machine print, `devices` each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "LCLM_COORDINATOR": f"127.0.0.1:{port}",
        "LCLM_PROCESSES": "2",
    }
    both = [
        subprocess.Popen(
            [sys.executable, *command],
            env=env | {"LCLM_PROCESS": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        told = [process.communicate(timeout=240) for process in both]
    finally:
        for process in both:
            process.kill()
    assert all(p.returncode == 0 for p in both), [err[-3000:] for _, err in told]
    return [out for out, _ in told]


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one(on_devices):
    told = in_two("-c", ONE_OF_TWO, devices=2)
    want = losses(on_devices(ALONE, count=1))[0]
    for out in told:
        found = losses(out)
        assert len(found) == 2
        for pair in found:
            assert pair == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_one_run_and_one_of_them_writes_it(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG.replace("TEXT", str(tmp_path / "text.txt")))
    command = ["-m", "lclm.cli", "train", f"--config={config}", "--mesh=fsdp=2"]
    command += [f"--workdir={tmp_path / 'two'}"]
    first = in_two(*command, "--until", "2", devices=1)
    assert "training" in first[0] and "training" not in first[1]
    in_two(*command, devices=1)
    run(str(config), workdir=tmp_path / "one", console=Console(quiet=True))
    found = [
        [r for r in read_journal(tmp_path / name / "metrics.jsonl") if "loss" in r]
        for name in ("one", "two")
    ]
    assert [r["step"] for r in found[1]] == [1, 2, 3, 4]
    for one, two in zip(*found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    one, two = (load_orbax(tmp_path / n / "model").params for n in ("one", "two"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)
    names = {p.name for p in (tmp_path / "two").iterdir()}
    assert names == {p.name for p in (tmp_path / "one").iterdir()}
    starts = read_journal(tmp_path / "two" / "metrics.jsonl")
    starts = [r["step"] for r in starts if r.get("event") == "start"]
    assert starts == [0, 2]


def test_several_processes_need_a_mesh(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    run = train_config(
        dict(
            name="n", model=dict(source="m"), data=dict(source="kjv"), steps=1, batch=1,
            length=8,
        )
    )  # fmt: skip
    with pytest.raises(LclmError, match="2 processes and no mesh"):
        make_layout(run, preset("tiny-bytes"))


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"LCLM_PROCESSES": "2"}, "without LCLM_COORDINATOR, LCLM_PROCESS"),
        (
            {"LCLM_COORDINATOR": "x:1", "LCLM_PROCESSES": "2", "LCLM_PROCESS": "2"},
            "from 0",
        ),
        (
            {"LCLM_COORDINATOR": "x:1", "LCLM_PROCESSES": "two", "LCLM_PROCESS": "0"},
            "LCLM_PROCESSES=two",
        ),
    ],
)
def test_an_environment_that_does_not_fit_together_is_refused(environ, words):
    with pytest.raises(LclmError, match=words):
        join(environ)


def test_without_the_environment_a_process_is_alone():
    assert join({}) == 1
