"""Every Hugging Face spelling of rotary parameters reads to the same spec."""

import numpy as np
import pytest

from lclm.config import ROPE_KINDS, RopeSpec
from lclm.errors import LclmError
from lclm.ops.rope import frequencies, rope_from_hf, rope_to_hf

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SPEC = RopeSpec(
    kind="llama3",
    theta=5e5,
    context=131072,
    factor=32.0,
    original=8192,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)


def read(table, **config):
    config = {"max_position_embeddings": 8192, **config}
    return rope_from_hf({**config, "rope_parameters": table})


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
        {
            "rope_theta": 1.0,
            "rope_scaling": {
                "rope_theta": 5e5,
                "type": "default",
                "rope_type": "llama3",
                **LLAMA3,
            },
        },
    ],
    ids=["v5 flat", "v4", "old type", "v5 outer theta", "inner theta wins"],
)
def test_the_flat_spellings_read_alike(config):
    assert rope_from_hf({"max_position_embeddings": 131072, **config}) == LLAMA3_SPEC


def test_nested_parameters_give_one_spec_per_layer_type():
    got = read(
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default"},
            "no_position": None,
        },
        rope_theta=2e4,
        partial_rotary_factor=0.5,
    )
    assert got == {
        "full_attention": RopeSpec("linear", 1e6, factor=8.0, partial=0.5),
        "sliding_attention": RopeSpec(theta=2e4, partial=0.5),
        "no_position": None,
    }


@pytest.mark.parametrize(
    "config",
    [
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "model_type": "gemma3_text",
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1e6,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ],
    ids=["v4", "defaults", "v5"],
)
def test_gemma3_scales_its_global_layers_only(config):
    got = rope_from_hf({"max_position_embeddings": 32768, **config})
    assert got == {
        "full_attention": RopeSpec("linear", 1e6, context=32768, factor=8.0),
        "sliding_attention": RopeSpec(theta=1e4, context=32768),
    }


def test_a_config_without_rotary_keys_is_the_default():
    assert rope_from_hf({"max_position_embeddings": 2048}) == RopeSpec(context=2048)
    assert rope_from_hf({"rope_theta": 1e5, "rope_scaling": None}).theta == 1e5


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_older_names_of_longrope_and_its_outer_original_length(name):
    table = {"type": name, "short_factor": [1, 1], "long_factor": [2.0, 3.0]}
    got = rope_from_hf(
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {**table, "original_max_position_embeddings": 1},
        }
    )
    assert got == RopeSpec(
        "longrope",
        context=131072,
        original=4096,
        short_factor=(1.0, 1.0),
        long_factor=(2.0, 3.0),
    )
    want = np.sqrt(1 + np.log(32) / np.log(4096))
    np.testing.assert_allclose(frequencies(got, 4)[1], want, rtol=1e-12)


def test_original_length_defaults_to_the_context():
    spec = read({"rope_type": "yarn", "factor": 4.0})
    explicit = {"factor": 4.0, "original_max_position_embeddings": 8192}
    named = read({"rope_type": "yarn", **explicit})
    assert (frequencies(spec, 64)[0] == frequencies(named, 64)[0]).all()


def test_yarn_without_factor_takes_the_ratio_of_lengths():
    spec = read(
        {
            "rope_type": "yarn",
            "factor": None,
            "original_max_position_embeddings": 2048,
        }
    )
    np.testing.assert_allclose(frequencies(spec, 64)[1], 0.1 * np.log(4) + 1)


def test_truncate_is_read_beside_the_layer_types_never_inside():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert read({**yarn, "truncate": False}).truncate is False
    inside = read({"full_attention": {**yarn, "truncate": False}})
    assert inside["full_attention"].truncate is True
    beside = read({"full_attention": yarn, "truncate": False})
    assert beside["full_attention"].truncate is False


ROUND = {
    "linear": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "dynamic": {"factor": 2.0, "partial": 0.5},
    "dynamic_linear": {"original": 4096},
    "yarn": {
        "factor": 4.0,
        "original": 4096,
        "beta_fast": 16.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "yarn_paper": {"factor": 4.0, "attention_factor": 1.5},
    "longrope": {"short_factor": (1.0, 2.0), "long_factor": (3.0, 4.0)},
    "llama3": {
        "factor": 8.0,
        "original": 4096,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"partial": 0.25, "factor": 2.0},
}


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_writing_then_reading_gives_the_same_spec(kind):
    spec = RopeSpec(kind, theta=5e5, context=32768, **ROUND.get(kind, {}))
    table = rope_to_hf(spec)
    assert read(table, max_position_embeddings=32768) == spec
    assert all(not isinstance(value, tuple) for value in table.values())


def test_nested_writing_keeps_layer_types_and_truncate():
    yarn = RopeSpec("yarn", factor=4.0, truncate=False)
    specs = {"full_attention": yarn, "sliding_attention": RopeSpec(), "none": None}
    assert read(rope_to_hf(specs)) == specs
    mixed = {"a": yarn, "b": RopeSpec("yarn", factor=4.0)}
    with pytest.raises(LclmError, match="truncate"):
        rope_to_hf(mixed)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (RopeSpec(layout="interleaved"), "permute"),
        (RopeSpec(attention_factor=2.0), "only yarn and longrope"),
    ],
)
def test_what_hugging_face_cannot_hold_is_an_error(spec, word):
    with pytest.raises(LclmError, match=word):
        rope_to_hf(spec)


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ({"rope_type": "lineer", "factor": 2.0}, "did you mean 'linear'"),
        ({"rope_type": 3}, "unknown RoPE type 3"),
        ({"rope_type": ["yarn"]}, "unknown RoPE type"),
        ({"rope_type": "linear", "factor": 0}, "must be > 0"),
        ({"rope_type": "linear", "factor": -2.0}, "must be > 0"),
        ({"rope_type": "linear", "factor": float("inf")}, "finite"),
        ({"rope_type": "linear", "factor": "8"}, "finite number"),
        ({"rope_type": "linear", "factor": True}, "finite number"),
        ({"rope_type": "linear"}, "needs 'factor'"),
        ({"rope_type": "linear", "factor": None}, "needs 'factor'"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fst": 1}, "no key 'beta_fst'"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "no key 'mrope_section'"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs 'low_freq_factor'"),
        ({"rope_type": "longrope", "short_factor": 1.0}, "list of numbers"),
        ({"rope_type": "longrope", "short_factor": [1, "x"]}, r"short_factor\[1\]"),
        (
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 0.5,
            },
            "whole number",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, "true or false"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"full_attention": {}, "factor": 3.0}, "nested per layer type"),
        ([1], "expected a table"),
    ],
)
def test_bad_parameters_are_one_clear_error(table, word):
    with pytest.raises(LclmError, match=word):
        read(table)


def test_two_spellings_that_disagree_are_an_error():
    scaling = {"type": "linear", "factor": 2.0}
    with pytest.raises(LclmError, match="keep one"):
        read({"rope_type": "linear", "factor": 4.0}, rope_scaling=scaling)


def test_lengths_that_a_kind_needs_are_named():
    with pytest.raises(LclmError, match="max_position_embeddings"):
        rope_from_hf({"rope_scaling": {"type": "dynamic", "factor": 2.0}})
