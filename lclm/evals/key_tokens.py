"""LongPPL (arXiv 2410.23771): perplexity of the tokens that a long context decides."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from lclm.evals.base import require
from lclm.evals.sliding import slide


@dataclass(frozen=True)
class KeyTokens:
    """Tokens to whose prediction the distant part of a text is the key.

    Those whose loss under full attention is below `most` nats and more than `gain` nats
    below the loss of a short context: at least `short` tokens, one start for each
    `block` targets. The paper lets another model choose them; here the model under
    test does, by its own full attention (self-evaluated), for all caches alike.
    """

    short: int = 4096
    block: int = 1024
    gain: float = 2.0
    most: float = 2.0

    def __post_init__(self):
        require(self.short >= 1, f"keys: short is {self.short}; at least 1 token")
        require(self.block >= 1, f"keys: block is {self.block}; at least 1 token")

    @property
    def name(self) -> str:
        """How records name the choice."""
        return (
            f"keys:short={self.short},block={self.block},gain={self.gain},"
            f"most={self.most}"
        )

    def find(
        self, nll_of, tokens: Int[np.ndarray, "1 T"], progress=None
    ) -> Int[np.ndarray, " keys"]:
        """Positions of the key tokens; `nll_of` maps int [1, W] to float [1, W - 1]."""
        window = self.short + self.block
        if tokens.shape[1] <= window:
            return np.zeros(0, np.int64)  # no context is short
        far = np.asarray(nll_of(tokens))[0]
        sliding = slide(
            nll_of, tokens, window=window, stride=self.block, progress=progress
        )
        chosen = (sliding.nll[0] - far > self.gain) & (far < self.most)
        return 1 + np.flatnonzero(chosen)
