"""Presets have the sizes their models are published with."""

import math

import pytest

from lclm.config import ModelConfig, find_runs, from_dict, to_dict
from lclm.errors import LclmError
from lclm.models.decoder import param_shapes
from lclm.models.presets import PRESETS, preset

PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma-3-270m": 268_098_176,
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
    "jamba-v0.1": 51_570_323_328,
    "jamba-1.5-mini": 51_570_323_328,
    "jamba-1.5-large": 398_555_145_696,
    "mixtral-8x7b": 46_702_792_704,
    "longgen-llama-2-7b": 6_738_415_616,
    "longgen-llama-2-7b-blocks": 6_738_415_616,
    "longgen-llama-3-8b": 8_030_261_248,
    "longgen-llama-3-8b-blocks": 8_030_261_248,
    "longgen-smollm2-135m": 134_515_008,
    "longgen-smollm2-135m-blocks": 134_515_008,
    "infini-llama-2-7b": 6_738_415_616 + 32 * 32,
    "infini-llama-3-8b": 8_030_261_248 + 32 * 32,
    "infini-smollm2-135m": 134_515_008 + 30 * 9,
    "megalodon-200m": 220_627_968,
    "megalodon-1.3b": 1_342_832_640,
    "megalodon-1.3b-pg19": 1_327_628_288,
    "megalodon-7.1b": 7_117_381_632,
    "megalodon-7.3b": 7_385_817_088,
    "megalodon-7b": 7_385_817_088,
    # Counted by hand: 259 x 128, four layers, a norm.
    "tiny-bytes": 820_736,
    "tiny-bytes-hybrid": 955_392,
    "mini-bytes": 213_760,
    "mini-bytes-deep": 312_320,
    "mini-bytes-mamba": 278_272,
    "mini-bytes-jamba": 373_740,
    "mini-bytes-megalodon": 257_984,
}


# Of families with several sizes, the others wait for `make test-all`.
QUICK = (
    "smollm2-135m llama-3.2-1b qwen2-0.5b qwen3-0.6b gemma-3-270m mamba-130m "
    "mamba2-130m jamba-v0.1 mixtral-8x7b longgen-smollm2-135m infini-smollm2-135m "
    "megalodon-200m tiny-bytes tiny-bytes-hybrid mini-bytes mini-bytes-jamba"
).split()


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS],
)
def test_a_preset_has_the_published_number_of_parameters(name):
    shapes = param_shapes(preset(name)).values()
    assert sum(math.prod(shape) for shape in shapes) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_dictionary_form(name):
    assert from_dict(ModelConfig, to_dict(preset(name))) == preset(name)
    assert find_runs(preset(name).layers) == preset(name).stack


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(LclmError, match=r"did you mean 'llama-3\.1-8b'"):
        preset("llama-3.1-8B")
