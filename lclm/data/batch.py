"""The arrays of a batch, made from token rows and document ids."""

import numpy as np

from lclm.typing import Batch

FIELDS = ("tokens", "targets", "positions", "segments", "weights")


def make_batch(
    rows: np.ndarray, segments: np.ndarray | None = None, mask: np.ndarray | None = None
) -> Batch:
    """A batch of [B, T] from token rows [B, T + 1].

    segments: document ids [B, T + 1] from 1 up, 0 for padding; one document where None.
    mask: 0 for tokens that are not to be predicted [B, T + 1] (prompts). A target
    counts where it is a token of its input's own document. Positions restart with each
    document; padding has position -1.
    """
    rows = np.asarray(rows, np.int32)
    if segments is None:
        segments = np.ones_like(rows)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weights = same.astype(np.float32)
    if mask is not None:
        weights *= mask[:, 1:]
    inputs = np.asarray(segments[:, :-1], np.int32)
    return {
        "tokens": np.ascontiguousarray(rows[:, :-1]),
        "targets": np.ascontiguousarray(rows[:, 1:]),
        "positions": positions(inputs),
        "segments": inputs,
        "weights": weights,
    }


def positions(segments: np.ndarray) -> np.ndarray:
    """Each token's index in its own document, -1 for padding."""
    index = np.broadcast_to(
        np.arange(segments.shape[1], dtype=np.int32), segments.shape
    )
    first = np.ones_like(segments, bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = np.maximum.accumulate(np.where(first, index, 0), axis=1)
    return np.where(segments > 0, index - start, -1).astype(np.int32)
