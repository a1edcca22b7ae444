"""Loss by position: segments, logarithmic and even buckets, bootstrap intervals."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

BLOCK = 16
RESAMPLES = 200

Losses = Float[np.ndarray, "documents targets"]


@dataclass(frozen=True)
class Bucket:
    """Mean loss in nats of targets at positions `start <= p < end`, and how sure.

    `low` and `high` bound 95% of the bootstrap means.
    """

    start: int
    end: int
    nll: float
    count: int
    low: float
    high: float

    def row(self) -> list[float | int]:
        """Start, end, nll, count, low, high: the form a record keeps."""
        return [self.start, self.end, self.nll, self.count, self.low, self.high]


def log_edges(length: int) -> list[int]:
    """1, 2, 4, ... up to `length`: buckets [2^k, 2^(k+1)) of target positions."""
    edges = [1]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return edges


def even_edges(length: int, width: int) -> list[int]:
    """0, width, 2 width, ... up to `length`."""
    return [*range(0, length, width), length]


def buckets(nll: Losses, edges: Sequence[int], *, seed: int = 0) -> list[Bucket]:
    """Mean loss between consecutive `edges`; target `p` is `nll[:, p - 1]`.

    Neighbouring losses are alike, so the bootstrap draws blocks of 16 targets of one
    document, never single tokens. Positions without a target are left out.
    """
    rng = np.random.default_rng(seed)
    found = []
    for start, end in itertools.pairwise(edges):
        part = np.asarray(nll, np.float64)[:, max(start, 1) - 1 : end - 1]
        if part.size:
            low, high = _interval(part, rng)
            found.append(Bucket(start, end, float(part.mean()), part.size, low, high))
    return found


def _interval(part: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    documents, targets = part.shape
    cuts = np.arange(0, targets, BLOCK)
    sums = np.add.reduceat(part, cuts, axis=1).ravel()
    sizes = np.tile(np.diff(np.append(cuts, targets)), documents)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        pick = rng.integers(0, len(sums), len(sums))
        means[i] = sums[pick].sum() / sizes[pick].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
