"""The engine's calls become programs of chips that are not here, kernels in them."""

import pytest

from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    RopeSpec,
    find_runs,
)
from tests.serve.lowering import engine_calls

SPEC = AttentionSpec(8, 4, 64, RopeSpec(context=4096))
CONFIG = ModelConfig("llama", 97, 64, find_runs((LayerSpec(SPEC, MlpSpec(96)),)), 4096)
SIZED = ("tova", "snapkv", "pyramidkv", "expected_attention", "knorm", "keydiff")
CALL = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}
# Whose calls have kernels: reading on a TPU, decoding there, and the same on Hopper,
# which takes no codes and no odd number of slots. Quest's first kernels are a token's.
POLICIES = {
    "full": "tt tt",
    "quest:budget=512,dense=0": "-t -t",
    "streaming:sinks=4,window=1020": "tt t-",
    "window:window=1025": "tt tt",
    "h2o:budget=1000": "tt tt",
    "h2o:budget=1024,bits=8": "tt t-",
    **{f"{name}:budget=1024": "tt tt" for name in SIZED},
    "infinipot:budget=1024": "tt tt",
}
FAST = ("full", "quest:budget=512,dense=0", "streaming:sinks=4,window=1020")


def lowered(cache: str, platform: str, **options) -> list[str]:
    """The programs that read a chunk and that decode, for a platform."""
    sizes = {"length": 4096, "chunk": 256}
    made = engine_calls(CONFIG, cache, platform, **sizes, **options)
    return [call.lower(lowering_platforms=(platform,)).as_text() for call in made]


SLOW = [pytest.param(c, marks=pytest.mark.slow) for c in POLICIES if c not in FAST]


@pytest.mark.parametrize("platform", CALL)
@pytest.mark.parametrize("cache", [*FAST, *SLOW])
def test_every_policy_is_lowered_with_its_kernels(cache, platform):
    wanted = POLICIES[cache].split()[platform == "cuda"]
    texts = lowered(cache, platform)
    assert wanted == "".join("-t"[CALL[platform] in text] for text in texts)


def test_devices_that_share_the_weights_run_no_kernel():
    for text in lowered("full", "tpu", spread=True):
        assert CALL["tpu"] not in text
