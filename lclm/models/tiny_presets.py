"""Small models over bytes: for smoke runs, tests of recipes, and a first look."""

from collections.abc import Callable

from lclm.config import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    RopeSpec,
    Run,
)
from lclm.specs import MambaSpec

# Of lclm.hub.tokenizer.ByteTokenizer: 256 bytes, then BOS, EOS, PAD.
VOCAB, BOS, EOS = 259, 256, 257


def _bytes(family: str, *group: LayerSpec, layers: int = 4) -> ModelConfig:
    stack = (Run(group, layers // len(group)),)
    return ModelConfig(family, VOCAB, 128, stack, 1024, bos=BOS, eos=(EOS,))


def _attention() -> LayerSpec:
    spec = AttentionSpec(4, 2, 32, RopeSpec(context=1024))
    return LayerSpec(spec, MlpSpec(384))


def _mamba() -> LayerSpec:
    return LayerSpec(MambaSpec(256, 8), MlpSpec(384))


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny-bytes": lambda: _bytes("llama", _attention()),
    "tiny-bytes-hybrid": lambda: _bytes("hybrid", _mamba(), _attention()),
}
