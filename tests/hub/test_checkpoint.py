"""Our own checkpoint folders give back what went in."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from lclm import hub
from lclm.errors import LclmError
from lclm.tree import flatten


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "model"
    bundle = hub.load(GOLDEN / "gemma3")
    bundle = dataclasses.replace(bundle, tokenizer=hub.ByteTokenizer())
    hub.save_orbax(folder, bundle)
    return folder, bundle


def test_round_trip_keeps_config_weights_and_tokenizer(saved):
    folder, bundle = saved
    again = hub.load(folder)
    assert again.config == bundle.config == hub.describe(folder)
    before, after = flatten(bundle.params), flatten(again.params)
    assert before.keys() == after.keys()
    for name in before:
        assert np.array_equal(before[name], after[name]), name
    assert again.tokenizer.encode("é!") == bundle.tokenizer.encode("é!")


def test_dtype_is_converted_on_reading(saved):
    params = flatten(hub.load(saved[0], dtype=jnp.bfloat16).params)
    assert all(v.dtype == jnp.bfloat16 for v in params.values())


def test_a_second_save_does_not_overwrite(saved):
    with pytest.raises(LclmError, match="already holds a checkpoint"):
        hub.save_orbax(*saved)


def test_another_format_or_another_shape_is_an_error(saved, tmp_path):
    folder, _ = saved
    head = json.loads((folder / "lclm.json").read_text())
    (tmp_path / "params").symlink_to(folder / "params")
    (tmp_path / "lclm.json").write_text(json.dumps(head | {"format": 99}))
    with pytest.raises(LclmError, match="format is 99"):
        hub.load(tmp_path)
    head["config"]["vocab"] = 65
    (tmp_path / "lclm.json").write_text(json.dumps(head))
    with pytest.raises(LclmError, match=r"embed/table is \(64, 32\), expected \(65, 3"):
        hub.load(tmp_path)
    head["config"]["vocabulary"] = 64
    (tmp_path / "lclm.json").write_text(json.dumps(head))
    with pytest.raises(LclmError, match="did you mean 'vocab'"):
        hub.load(tmp_path)


def test_a_checkpoint_without_weights_is_an_error(saved, tmp_path):
    (tmp_path / "lclm.json").write_bytes((saved[0] / "lclm.json").read_bytes())
    with pytest.raises(LclmError, match="not an Orbax checkpoint"):
        hub.load(tmp_path)
