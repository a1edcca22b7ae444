"""Laws of the model description and of its strict dictionary form."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
    Run,
    find_runs,
    from_dict,
    to_dict,
)
from lclm.errors import LclmError


def layer(width: int = 8, **attention) -> LayerSpec:
    spec = AttentionSpec(heads=4, kv_heads=2, head_dim=8, **attention)
    return LayerSpec(mixer=spec, mlp=MlpSpec(width))


def model(*layers: LayerSpec) -> ModelConfig:
    return ModelConfig("llama", 32, 16, find_runs(layers), context=64, eos=(2, 3))


def test_dictionary_form_round_trips_through_json():
    rope = RopeSpec("longrope", short_factor=(1.0, 2.0), long_factor=(4.0, 8.0))
    config = model(layer(), layer(window=4), layer(rope=rope), layer(rope=None))
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_config_is_hashable_and_compares_by_value():
    assert hash(model(layer())) == hash(model(layer()))
    assert model(layer()) != model(layer(window=4))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=24))
def test_runs_cover_the_layers_in_order(kinds):
    layers = tuple(layer(width=8 * (kind + 1)) for kind in kinds)
    runs = find_runs(layers)
    assert tuple(s for r in runs for _ in range(r.repeats) for s in r.group) == layers


def test_runs_find_the_repeated_group():
    local, whole = layer(window=4), layer()
    runs = find_runs((*([local] * 5), whole) * 4 + (local, local))
    assert [(len(run.group), run.repeats) for run in runs] == [(6, 4), (1, 2)]


def test_integers_become_floats_but_booleans_do_not():
    assert from_dict(NormSpec, {"eps": 1}).eps == 1.0
    with pytest.raises(LclmError, match="eps is True; expected float"):
        from_dict(NormSpec, {"eps": True})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vocabb": 1}, "did you mean 'vocab'"),
        ({"vocab": "many"}, "vocab is 'many'; expected int"),
        ({"stack": 3}, "stack is 3; expected a list"),
        ({"norm": {"epsilon": 1e-5}}, "norm. has no option 'epsilon'"),
        ({"norm": 3}, "expected a table, found 3"),
        ({"eos": ["a"]}, r"eos\[0\] is 'a'"),
    ],
)
def test_a_wrong_entry_is_one_error_that_names_it(change, text):
    with pytest.raises(LclmError, match=text):
        from_dict(ModelConfig, to_dict(model(layer())) | change)


def test_a_missing_entry_is_named():
    data = to_dict(model(layer()))
    del data["width"]
    with pytest.raises(LclmError, match="required option 'width' missing"):
        from_dict(ModelConfig, data)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RopeSpec("yarm"), "did you mean 'yarn'"),
        (lambda: RopeSpec(factor=0.0), "factor is 0.0; it must be > 0"),
        (lambda: RopeSpec(theta=-1.0), "rope_theta is -1.0"),
        (lambda: RopeSpec(partial=1.5), "partial_rotary_factor 1.5"),
        (lambda: RopeSpec(context=0), "context is 0"),
        (lambda: RopeSpec(layout="halves"), "layout 'halves'"),
        (lambda: RopeSpec(angles="exakt"), "angles 'exakt'"),
        (lambda: AttentionSpec(6, 4, 8), "6 heads over 4 kv heads"),
        (lambda: AttentionSpec(4, 2, 8, window=0), "window is 0; it must be at least"),
        (lambda: MlpSpec(8, activation="sil"), "did you mean 'silu'"),
        (lambda: Run((), 1), "at least one layer"),
        (lambda: Run((layer(),), 0), "0 repeats"),
    ],
)
def test_a_value_outside_its_range_is_refused(make, text):
    with pytest.raises(LclmError, match=text):
        make()
