"""Laws of several processes: they are one machine with all their devices."""

import os
import socket
import subprocess
import sys

import pytest

from lclm.errors import LclmError
from lclm.train.processes import join

ONE_OF_TWO = """
import sys
from lclm.train.processes import join
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
ALONE = """
from tests.train.meshes import batch, run_of, trainer
made = trainer("plain", run_of())
state, told = made.step(made.state, made.frozen, made.place(batch()))
print("loss", float(told["loss"]), float(told["grad_norm"]))
"""


def losses(text: str) -> list[list[float]]:
    lines = [x.split() for x in text.splitlines() if x.startswith("loss")]
    return [[float(x) for x in line[1:]] for line in lines]


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one(on_devices):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "LCLM_COORDINATOR": f"127.0.0.1:{port}",
        "LCLM_PROCESSES": "2",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO],
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
    want = losses(on_devices(ALONE, count=1))[0]
    for out, _ in told:
        found = losses(out)
        assert len(found) == 2
        for pair in found:
            assert pair == pytest.approx(want, rel=1e-5)


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
