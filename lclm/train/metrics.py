"""What a run costs and how it goes: arithmetic of a step, peaks of devices."""

import math

import jax

from lclm.config import AttentionSpec, ModelConfig
from lclm.models.decoder import param_shapes
from lclm.specs import MoeSpec
from lclm.train.config import TrainConfig

# Dense bfloat16 peak in FLOP/s of one device, by the start of its `device_kind`.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
CONVENTION = "6 FLOPs a matrix weight and token, 12 H a visible pair and head"


def step_flops(config: ModelConfig, batch: int, length: int) -> float:
    """FLOPs of forward and backward over `batch` rows of one document each.

    Counted once, whatever is computed again: 6 per token and weight of every matrix a
    token meets (chosen experts only), 12 per visible pair, head and head width. Pairs
    are those that the layer's mask shows, so a causal layer counts half the square.
    """
    from lclm.blocks.attention import layer_mask

    tokens = batch * length
    total = 6.0 * tokens * _matrix_weights(config)
    for spec in config.layers:
        mixer = spec.mixer
        if isinstance(mixer, AttentionSpec):
            pairs = layer_mask(mixer).pairs(length, length, mixer.heads)
            total += 12.0 * batch * pairs * mixer.head_dim
    return total


def mean_step(config: ModelConfig, run: TrainConfig) -> tuple[float, float]:
    """Tokens and FLOPs of a step, the mean over the row lengths that a run takes."""
    lengths = run.data.lengths or (run.length,)
    costs = {n: step_flops(config, run.batch, n) for n in set(lengths)}
    tokens = run.batch * sum(lengths) / len(lengths)
    return tokens, sum(costs[n] for n in lengths) / len(lengths)


def _matrix_weights(config: ModelConfig) -> float:
    """Weights of matrices that one token is multiplied with."""
    total = float(config.vocab * config.width)
    for path, shape in param_shapes(config).items():
        if len(shape) < 2 or not path.startswith("layers_"):
            continue
        size = math.prod(shape)
        if "/experts/" in path:
            moe = config.layers[int(path.split("/")[0].removeprefix("layers_"))].mlp
            assert isinstance(moe, MoeSpec)
            size *= moe.top / moe.experts
        total += size
    return total


def peak_flops(device: jax.Device) -> float | None:
    """bfloat16 peak of a device in FLOP/s; None where it is not in the table."""
    found = [k for k in PEAKS if device.device_kind.startswith(k)]
    return PEAKS[max(found, key=len)] if found else None
