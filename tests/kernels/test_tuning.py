"""Tables of sizes: what they may hold, and who reads which."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernels_tune
from pallas_kernels import dispatch, tuning
from pallas_kernels import mask as M
from pallas_kernels.attention import attention
from tests.kernels.prove import CHIPS

TABLES = sorted(tuning.HERE.glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_chip_s_table_has_sizes_that_the_defaults_have(path):
    defaults, own = tuning.table(None), json.loads(path.read_text())
    assert own.keys() <= defaults.keys()
    for kernel, sizes in own.items():
        assert sizes.keys() <= defaults[kernel].keys()
        for name, size in sizes.items():
            assert type(size) is type(defaults[kernel][name]) and size > 0


def test_every_chip_of_the_proof_has_a_table():
    assert {path.stem for path in TABLES} == {"default", *CHIPS}
    assert set(tuning.KINDS.values()) == set(CHIPS)


def test_a_chip_s_own_sizes_stand_before_the_defaults(monkeypatch, tmp_path):
    (tmp_path / "default.json").write_text(
        '{"scan_tpu": {"forward": 8, "backward": 4}}'
    )
    (tmp_path / "v6e.json").write_text('{"scan_tpu": {"backward": 2}}')
    monkeypatch.setattr(tuning, "HERE", tmp_path)
    tuning.table.cache_clear()
    try:
        assert tuning.of("scan_tpu") == (8, 4)
        with dispatch.target("tpu", "v6e"):
            assert tuning.chip() == "v6e" and tuning.of("scan_tpu") == (8, 2)
            with tuning.using("scan_tpu", forward=16):
                assert tuning.of("scan_tpu") == (16, 2)
        with dispatch.target("tpu"):
            assert tuning.chip() is None and tuning.of("scan_tpu") == (8, 4)
    finally:
        tuning.table.cache_clear()


def test_other_sizes_are_traced_anew():
    q = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)

    @jax.jit
    def run(q):
        return attention(q, q, q, mask=M.causal(), implementation="mosaic_tpu")

    def grid():
        with dispatch.target("tpu"):
            return str(run.trace(q).jaxpr)

    whole = grid()
    with tuning.using("attention_tpu", tile=1 << 15):
        assert grid() != whole
    assert grid() == whole


@pytest.mark.parametrize("ask", [("scan", {"block": 1}), ("scan_tpu", {"blocks": 1})])
def test_an_unknown_size_is_named(ask):
    kernel, sizes = ask
    with pytest.raises(ValueError, match=f"{kernel!r}: it has .*kernels are"):
        with tuning.using(kernel, **sizes):
            pass


def test_tuning_goes_on_from_the_best_size_so_far():
    times = {(1, 1): 1.0, (2, 1): 0.5, (2, 2): 0.495, (2, 4): 0.4, (4, 1): float("inf")}
    choices, start = {"a": (1, 2, 4), "b": (1, 2, 4)}, {"a": 1, "b": 1}
    best, least = kernels_tune.descend(
        choices, start, lambda sizes: times[sizes["a"], sizes["b"]]
    )
    assert (best, least) == ({"a": 2, "b": 4}, 0.4)


def test_what_is_tuned_is_in_the_tables_and_its_cases_are_measured():
    defaults = tuning.table(None)
    for kernel, (name, choices) in kernels_tune.CHOICES.items():
        assert choices.keys() <= defaults[kernel].keys()
        assert all(defaults[kernel][size] in values for size, values in choices.items())
        assert kernels_tune.case(name).name == name
