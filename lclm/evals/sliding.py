"""Sliding-window evaluation: windows read afresh, each target scored once."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lclm.evals.base import require


def check_window(window: int, stride: int) -> None:
    """Every token must be scored, and each window must see what it scores."""
    require(window >= 2, f"window is {window}; it must be at least 2 tokens")
    require(
        1 <= stride < window,
        f"stride is {stride}; allowed is 1 to {window - 1} (window - 1), so that "
        "every scored token has context",
    )


@dataclass(frozen=True)
class Sliding:
    """Per-token losses of a sliding evaluation, and the mean of each window."""

    nll: Float[np.ndarray, "1 targets"]
    window_means: tuple[float, ...]

    def perplexity(self, compat: str = "token") -> float:
        """`token`: exp of the token-weighted mean; `yarn`: of the mean of window means.

        The second (arXiv 2309.00071's script) gives the first, full window the weight
        of one short stride.
        """
        means = {
            "token": float(np.mean(self.nll, dtype=np.float64)),
            "yarn": float(np.mean(self.window_means)),
        }
        require(compat in means, f"compat is {compat!r}; allowed are {list(means)}")
        return exp(means[compat])


def slide(nll_of, tokens, *, window: int, stride: int, progress=None) -> Sliding:
    """Windows at 0, stride, 2 stride, ... of at most `window` tokens of int [1, T].

    `nll_of` maps int [1, W] to float [1, W - 1]. Each target counts once, in the
    first window that reaches it, with all the context that window has.
    """
    check_window(window, stride)
    length = tokens.shape[1]
    parts, means, scored = [], [], 1
    for start in range(0, length, stride):
        end = min(start + window, length)
        nll = np.asarray(nll_of(tokens[:, start:end]))
        parts.append(nll[:, scored - start - 1 :])
        means.append(float(parts[-1].mean(dtype=np.float64)))
        scored = end
        if progress is not None:
            progress(end)
        if end == length:
            break
    return Sliding(np.concatenate(parts, axis=1), tuple(means))


def exp(mean: float) -> float:
    """Perplexity of a mean loss in nats, held below the largest double."""
    return math.exp(min(mean, 700.0))
