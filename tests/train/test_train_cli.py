"""Laws of `lclm train`: it goes on where it was stopped, however it was stopped."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from rich.console import Console

import lclm
from lclm.cli.config_file import read_config
from lclm.cli.main import main
from lclm.cli.train import run, source
from lclm.errors import LclmError
from lclm.train.config import train_config
from lclm.train.records import read_journal

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(6000))
CONFIG = """
def get_config(steps=8, every=3, lr=3e-3, lora=False, name="tiny", start="", wait=0.0):
    model = dict(source="tiny-bytes", scratch=True, tokenizer="bytes")
    if lora:
        model |= dict(lora=dict(rank=2), trains=("norm",))
    return dict(
        name=name, model=model, data=dict(source="local:path=TEXT"), start_from=start,
        steps=steps, batch=2, length=32, compute="float32", log_every=2,
        optimizer=dict(lr=lr, warmup=2), checkpoints=dict(every=every),
        holdout=dict(source="local:path=TEXT"), eval_every=4, eval_batches=2,
    )
"""
TIMES = ("seconds", "tokens_per_second", "tflops", "mfu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "text.txt").write_text(TEXT)
    file = folder / "tiny.py"
    file.write_text(CONFIG.replace("TEXT", str(folder / "text.txt")))
    return file


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config, folder)
    return folder


def train(config, folder, **options) -> str:
    """What `lclm train` prints."""
    out = io.StringIO()
    run(str(config), workdir=folder, console=Console(file=out, width=200), **options)
    return out.getvalue()


def lines(folder) -> list:
    found = read_journal(folder / "metrics.jsonl")
    kept = [r for r in found if r.get("event") != "start"]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in kept]


def params(folder):
    return lclm.hub.load_orbax(folder / "model").params


def same(one, other) -> None:
    """Models and records of two runs are equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, params(one), params(other))
    assert lines(one) == lines(other)


def start(config, folder, *flags) -> subprocess.Popen:
    """`lclm train` in a process of its own."""
    command = [sys.executable, "-m", "lclm.cli", "train", f"--config={config}"]
    return subprocess.Popen(
        [*command, f"--workdir={folder}", *flags],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, folder, step: int) -> None:
    """Return when the run has recorded a step."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        found = read_journal(folder / "metrics.jsonl")
        if any(r["step"] >= step and "event" not in r for r in found):
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1][-2000:])


def test_a_run_leaves_records_events_a_curve_and_a_model(whole):
    assert {p.name for p in whole.iterdir()} == {
        "train.json", "metrics.jsonl", "events", "loss.png", "loss.csv",
        "checkpoints", "model",
    }  # fmt: skip
    records = lines(whole)
    assert [r["step"] for r in records if "event" not in r] == [1, 2, 4, 6, 8]
    looks = [r for r in records if r.get("event") == "eval"]
    assert [r["step"] for r in looks] == [0, 4, 8]
    assert looks[2]["nll"] < looks[1]["nll"] and looks[1]["tokens"] == 128
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p for p in (whole / "events").iterdir() if p.stat().st_size > 200]


def test_a_finished_run_says_so_and_does_nothing(config, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    assert "is finished" in train(config, whole)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_goes_on_as_if_nothing_had_been(config, whole, tmp_path, seed):
    steps = f"{config}:steps=8"
    process = start(steps, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", random.Random(seed).choice([1, 2, 4, 6]))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    train(steps, tmp_path / "run")
    same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(config, tmp_path, number):
    long = f"{config}:steps=4000,every=0"
    folder = tmp_path / "run"
    process = start(long, folder)
    wait_for_step(process, folder, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    (told,) = errors.strip().splitlines()
    assert "to go on: lclm train --config=" in told and str(folder) in told
    (step,) = [int(p.name) for p in (folder / "checkpoints").iterdir()]
    assert 2 <= step < 4000 and f"after step {step};" in told
    assert not (folder / "model").exists()


def test_another_config_in_the_same_folder_is_refused_by_field(config, whole, capsys):
    argv = ["train", f"--config={config}:lr=0.1", f"--workdir={whole}"]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert "optimizer.lr is 0.003 there and 0.1 now" in told and "--restart" in told


@pytest.mark.slow
def test_restart_keeps_the_earlier_folder(config, whole, tmp_path):
    folder = tmp_path / "run"
    train(config, folder)
    (folder / "mark").write_text("x")
    train(f"{config}:lr=0.01,steps=2", folder, restart=True)
    assert (tmp_path / "run.old-1" / "mark").exists()
    assert not (folder / "mark").exists() and (folder / "model").exists()


def test_a_workdir_that_is_a_file_or_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LclmError, match="is a file"):
        train(config, tmp_path / "file")
    with pytest.raises(LclmError, match="is a file"):
        train(config, tmp_path / "file" / "below")
    with pytest.raises(LclmError, match=r"no train\.json"):
        train(config, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_mesh_on_the_command_line_stands_in_for_the_configs(config, whole, tmp_path):
    train(config, tmp_path / "run", mesh="fsdp=1")
    same(whole, tmp_path / "run")


def test_a_mesh_that_does_not_fit_is_refused_and_nothing_written(config, tmp_path):
    for mesh, words in (("fsdp=2", "1 devices"), ("fdsp=1", "fsdp"), ("fsdp", "AXIS=")):
        with pytest.raises(LclmError, match=words):
            train(config, tmp_path / "other", mesh=mesh)
    assert not (tmp_path / "other").exists()


def test_a_disk_too_small_is_refused_and_nothing_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: type("usage", (), {"free": 1000})
    )
    with pytest.raises(LclmError, match="GB free"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stage_starts_from_a_finished_run(config, whole, tmp_path):
    folder = tmp_path / "second"
    train(f"{config}:name=second,start={whole},steps=2,lr=1e-4", folder)
    losses = [[r["loss"] for r in lines(f) if "loss" in r] for f in (whole, folder)]
    assert losses[1][0] < losses[0][1]
    assert json.loads((folder / "train.json").read_text())["start_from"] == str(whole)


def test_the_adapter_of_a_run_is_small_and_gives_the_trained_model(config, tmp_path):
    train(f"{config}:lora=True,steps=4", tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    spec = train_config(read_config(f"{config}:lora=True")).model
    base = source(spec, seed=0)
    made = lclm.hub.with_adapter(base, tmp_path / "run" / "adapter")
    jax.tree.map(np.testing.assert_array_equal, made.params, params(tmp_path / "run"))
    held = sum(f.stat().st_size for f in (tmp_path / "run" / "adapter").iterdir())
    assert held < 100_000
