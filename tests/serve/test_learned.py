"""Gates and heads belong to weights, not to shapes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from lclm import cache as policies
from lclm import learned
from lclm.errors import LclmError
from lclm.learned import Extra, Model, alike, fingerprint, load_extra, save_extra, shape
from lclm.ops.int8 import quantize_params
from lclm.ops.packed import pack_blocks
from lclm.serve.calls import Engine
from lclm.serve.session import Session
from tests.tiny import tiny_config

CONFIG = tiny_config()


def table(seed: int, rows: int = 97, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def gates(folder, *, weights=(), base="a-model") -> str:
    alpha = {"alpha": np.array([[1.0, 0.2], [0.1, 0.9]], np.float32)}
    extra = Extra("duo_gates", base, alpha, shape(CONFIG), {}, weights)
    return str(save_extra(folder, extra))


def opened(policy: str, own: np.ndarray, name: str = "") -> Session:
    params = {"embed": {"table": own}}
    engine = Engine(CONFIG, params, jnp.float32, jnp.float32, name=name)
    return Session(engine, policies.make(policy), rows=1, length=8, chunk=4)


def test_a_fingerprint_is_that_of_the_weights_however_they_are_held():
    whole = table(0, 64, 320)
    blocks = whole.reshape(64, 10, 32)
    low, high = blocks.min(-1), blocks.max(-1)
    scale = ((high - low) / 15).astype(np.float16)
    codes = np.clip(np.round((blocks - low[..., None]) / scale[..., None]), 0, 15)
    held = (
        jnp.asarray(whole, jnp.bfloat16),
        quantize_params({"embed": {"table": whole}}, "int8")["embed"]["table"],
        pack_blocks(codes.astype(np.uint8), scale, low.astype(np.float16), 4),
        whole + 0.1 * table(1, 64, 320),  # trained a little further
    )
    assert all(alike(fingerprint(x), fingerprint(whole)) for x in held)
    others = (table(seed, 64, 320) for seed in range(1, 50))
    assert not any(alike(fingerprint(x), fingerprint(whole)) for x in others)
    assert not alike((), fingerprint(whole))


def test_gates_open_for_the_weights_they_were_trained_for(tmp_path, monkeypatch):
    own = table(0)
    file = gates(tmp_path, weights=fingerprint(own))
    assert opened(f"duo:gates={file}", own).policy.heads
    monkeypatch.setattr(learned, "FOLDER", tmp_path)
    assert opened("duo:window=64KiB", own).policy.heads


def test_gates_of_other_weights_are_refused_by_both_names(tmp_path, monkeypatch):
    file = gates(tmp_path, weights=fingerprint(table(1)))
    says = r"of 'a-model', but the model 'mine' has other weights.*duo:gates=FILE"
    for policy in (f"duo:gates={file}", f"duo:window=64KiB,gates={file}"):
        with pytest.raises(LclmError, match=says):
            opened(policy, table(0), "mine")
    monkeypatch.setattr(learned, "FOLDER", tmp_path)
    with pytest.raises(LclmError, match="the shape of 'a-model' and other weights"):
        opened("duo", table(0))


def test_a_file_that_names_the_model_or_no_weights(tmp_path):
    unsigned = gates(tmp_path)
    with pytest.raises(LclmError, match="of 'a-model', but this model has other"):
        opened(f"duo:gates={unsigned}", table(0))
    assert opened(f"duo:gates={unsigned}", table(0), "a-model").policy.heads
    heads = ((True, False), (False, True))
    held = {"name": "duo", "gates": unsigned, "heads": heads}
    assert opened(held, table(0)).policy.heads == heads  # as a saved context has them


def test_heads_of_other_weights_are_refused(tmp_path):
    fits = {"w1": np.ones((2, 16, 64)), "w2": np.ones((2, 2, 16))}
    own = fingerprint(table(0))
    made = Extra("locret_heads", "tiny", fits, shape(CONFIG), {}, own)
    locret = f"locret:heads={save_extra(tmp_path, made)}"
    assert opened(locret, table(0)).policy.heads
    with pytest.raises(LclmError, match=r"locret_heads of 'tiny', but this model"):
        opened(locret, table(1))


@pytest.mark.parametrize("name", ["duo", "locret"])
def test_what_ships_names_its_model_and_carries_its_fingerprint(name):
    with safe_open(learned.FOLDER / f"smollm2-135m.{name}.safetensors", "numpy") as f:
        head = f.metadata()
    assert head["base"] == "smollm2-135m"
    assert len(json.loads(head["weights"])) == 64


def test_a_fingerprint_is_written_and_read_as_it_is(tmp_path):
    own = fingerprint(table(0))
    assert load_extra(gates(tmp_path, weights=own)).weights == own
    assert Model("x", table(0)).weights == own
