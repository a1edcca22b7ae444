"""Laws of what is compiled for devices that are not here."""

import pytest

from lclm.errors import LclmError
from lclm.train.ahead import CHIPS, Ahead, topology
from lclm.train.collectives import collectives

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


def test_a_kind_of_device_that_is_not_known_is_an_error_with_a_remedy():
    with pytest.raises(LclmError, match="v5e"):
        topology("v5:4x4")
