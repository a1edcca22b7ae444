"""Laws of what is compiled for devices that are not here."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from lclm.cli.config_file import read_mesh
from lclm.errors import LclmError
from lclm.models.presets import preset
from lclm.ops import linear
from lclm.train.ahead import CHIPS, Ahead, compile_step, topology, trace_step
from lclm.train.collectives import collectives
from lclm.train.config import Mesh, train_config
from lclm.train.metrics import mean_step, step_flops
from lclm.train.step import make_step
from pallas_kernels import dispatch
from pallas_kernels.attention import xla

HLO = """HloModule step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %shard = bf16[2,4]{1,0} copy(%x)
  %whole = bf16[8,4]{1,0} all-gather(%shard), replica_groups=[1,4]<=[4], dimensions={0}
  %part = f32[2]{0} reduce-scatter(%g), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %out = (s32[], f32[8]) tuple(%i, %y)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%t), condition=%condition, body=%body, backend_config={\
"known_trip_count":{"n":"30"}}
  %moved = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), \
source_target_pairs={{0,1}}
  ROOT %sum = f32[8]{0} all-reduce(%z), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""


def test_collectives_in_a_loop_count_once_an_iteration():
    found = collectives(HLO)
    assert found["all-gather"] == (30, 30 * 8 * 4 * 2 * 3 // 4)
    assert found["reduce-scatter"] == (30, 30 * 2 * 4 * 4 * 3 // 4)
    assert found["collective-permute"] == (1, 32)
    assert found["all-reduce"] == (1, 32)


def test_a_step_takes_at_least_its_slowest_resource():
    chip = CHIPS["v5e"]
    found = Ahead(chip, 4, 8 << 30, 9 << 30, 197e12, 819e9, {"all-gather": (1, 200)})
    assert not found.fits
    assert found.seconds()["arithmetic"] == found.seconds()["memory"] == 1.0
    assert found.seconds()["links"] == pytest.approx(1e-9)


TPU = """HloModule step

%start (a: bf16[2,4]) -> bf16[8,4] {
  ROOT %g.1 = bf16[8,4]{1,0:T(8)} all-gather(%a), channel_id=7, GROUPS, CHAIN
}

%fused (a: bf16[2,4]) -> bf16[8,4] {
  ROOT %g.2 = bf16[8,4]{1,0:T(8)} all-gather(%a), channel_id=7, GROUPS, CHAIN
}

%less (p: (s32[], bf16[2,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(4), metadata={}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (p: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %one = bf16[8,4]{1,0} fusion(%x), kind=kCustom, calls=%start
  %two = bf16[8,4]{1,0} fusion(%x), kind=kCustom, calls=%fused
  %sum = bf16[2,4]{1,0} reduce-scatter(%g), channel_id=1, GROUPS, to_apply=%add
  %other = bf16[2,4]{1,0} reduce-scatter(%h), channel_id=1, GROUPS, to_apply=%add
}

ENTRY %main (x: bf16[2,4]) -> bf16[2,4] {
  %loop = (s32[], bf16[2,4]) while(%t), condition=%less, body=%body
}
"""
TPU = TPU.replace("GROUPS", "replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}")
TPU = TPU.replace("CHAIN", 'frontend_attributes={chain_id="3"}')


def test_what_a_tpu_splits_in_parts_counts_once_an_iteration_of_a_counted_loop():
    found = collectives(TPU)
    assert found["all-gather"] == (4, 4 * 8 * 4 * 2 * 3 // 4)
    assert found["reduce-scatter"] == (8, 8 * 2 * 4 * 4 * 2 * 3 // 4)


RUN = dict(
    name="toy",
    model=dict(source="tiny-bytes", scratch=True, tokenizer="bytes"),
    data=dict(source="kjv"),
    steps=1,
    batch=4,
    length=64,
)


def run_of(**changes):
    return train_config(RUN | changes)


def products(platform):
    """Operand types of a toy step's products, the loss's apart, lowered for one."""
    config = preset("tiny-bytes")
    step = make_step(run_of(), config)
    with dispatch.target(platform), dispatch.preferring("xla"):
        traced = trace_step(step, config, jax.devices()[0])
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"dot_general.*: \((.*)\) -> (.*)", text)
    kinds = [
        "/".join(sorted(set(re.findall(r"x([a-z]+\d+)>", operands))))
        for operands, result in found
        if f"{config.vocab}x" not in operands + result
    ]
    return {kind: kinds.count(kind) for kind in kinds}


def test_what_is_lowered_for_an_accelerator_multiplies_bfloat16(monkeypatch):
    monkeypatch.setattr(linear, "has_amx", lambda: False)
    monkeypatch.setattr(xla, "_matrix_units", lambda: False)
    here, there = products("cpu"), products("tpu")
    assert set(here) == {"f32"}
    # The one that stays sums attention's outputs times their cotangents.
    assert there == {"f32": 1, "bf16": here["f32"] - 1}


def test_a_target_is_seen_by_every_choice_of_form_and_nests():
    def seen():
        assert jax.jit(lambda x: x.astype(xla.compute_dtype(x.dtype)))(one).dtype == (
            jnp.float32
            if dispatch.platform() == "cpu" and not xla._matrix_units()
            else jnp.bfloat16
        )
        return dispatch.platform()

    one, here = jnp.ones(1, jnp.bfloat16), jax.default_backend()
    assert seen() == here
    with pytest.raises(ZeroDivisionError), dispatch.target("tpu"):
        assert seen() == "tpu"
        with dispatch.target("cpu"):
            assert seen() == "cpu"
        with dispatch.target("cuda"):
            assert seen() == "gpu"
        assert seen() == "tpu"
        raise ZeroDivisionError
    assert seen() == here
    with pytest.raises(ValueError, match="vulkan"), dispatch.target("vulkan"):
        pass


def test_a_node_of_gpus_is_described_to_the_compiler(monkeypatch):
    asked = []

    def described(**options):
        asked.append(options)
        return SimpleNamespace(devices=list(range(16)))

    monkeypatch.setattr(topologies, "get_topology_desc", described)
    for text, devices in (("h200", 1), ("h200:1", 1), ("h200:8", 16), ("h200:2x8", 16)):
        chip, found = topology(text)
        assert chip is CHIPS["h200"] and len(found) == devices
    shapes = [options["topology"] for options in asked]
    assert shapes == ["1x1x1", "1x1x1", "1x1x8", "1x2x8"]
    assert "NVIDIA H200" in asked[0]["target_config"]
    assert f"device_memory_size: {CHIPS['h200'].memory}" in asked[0]["target_config"]
    topology("v5p:1")
    assert asked[-1] == {"platform": "tpu", "topology_name": "v5p:2x2x1"}


@pytest.mark.parametrize("shape", ["0", "16", "2x9", "0x8", "1x1x8", "x8", "-1", "two"])
def test_nodes_that_do_not_exist_are_an_error_with_a_remedy(shape):
    with pytest.raises(LclmError, match="h200:2x8 for two"):
        topology(f"h200:{shape}")


@pytest.mark.parametrize(
    "text, error, remedy",
    [
        ("h200:8", "topology not implemented for cuda", r'pip install "jax.cuda13.==0'),
        ("v5e:4x4", "JAX TPU support not installed", r'pip install "jax.tpu.==0'),
        ("v5e:5", "INVALID_ARGUMENT", "v5e:4x4"),
    ],
)
def test_a_compiler_that_is_not_installed_is_named(monkeypatch, text, error, remedy):
    def broken(**_):
        raise RuntimeError(error)

    monkeypatch.setattr(topologies, "get_topology_desc", broken)
    with pytest.raises(LclmError, match=remedy):
        topology(text)


def test_rows_of_several_lengths_count_by_their_share():
    config = preset("tiny-bytes")
    data = dict(source="kjv", lengths=(16, 64, 16))
    tokens, flops = mean_step(config, run_of(data=data))
    assert tokens == 4 * 32
    short, long = (step_flops(config, 4, n) for n in (16, 64))
    assert flops == pytest.approx((2 * short + long) / 3)
    assert mean_step(config, run_of()) == (4 * 64, long)


def test_a_mesh_is_read_as_the_config_writes_it():
    assert read_mesh("fsdp=-1,context_ring=2,context=ring") == Mesh(
        fsdp=-1, context_ring=2, context="ring"
    )
    for text in ("fsdp", "fdsp=2", "fsdp=two"):
        with pytest.raises(LclmError):
            read_mesh(text)


def test_devices_without_a_mesh_are_refused_before_anything_is_compiled():
    with pytest.raises(LclmError, match="mesh=dict"):
        compile_step(run_of(), preset("tiny-bytes"), CHIPS["v5e"], [None, None])


@pytest.mark.slow
@pytest.mark.parametrize(
    "plugin, text", [("jax_cuda13_plugin", "h200:2"), ("libtpu", "v5e:2x2")]
)
@pytest.mark.parametrize("alone", [False, True])
def test_a_step_compiles_for_devices_that_are_not_here(plugin, text, alone):
    pytest.importorskip(plugin)
    chip, devices = topology(text.partition(":")[0] if alone else text)
    mesh = None if alone else dict(fsdp=-1)
    found = compile_step(run_of(mesh=mesh), preset("tiny-bytes"), chip, devices)
    assert found.devices == len(devices) and found.fits
    assert found.held > 0 and found.temporary > 0 and found.flops > 0
    assert bool(found.collectives) is not alone


def test_a_kind_of_device_that_is_not_known_is_an_error_with_a_remedy():
    with pytest.raises(LclmError, match="v5e"):
        topology("v5:4x4")
