"""Rows of tokens by number: what batches are made of."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from lclm.data.packing import Plan

Row = dict[str, np.ndarray]
"""tokens and segments int32 [T + 1], mask uint8 [T + 1] (1: may be predicted)."""


@runtime_checkable
class Documents(Protocol):
    """Tokenised documents by number, read in parts."""

    lengths: np.ndarray
    hashes: np.ndarray

    def read(self, doc: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of a part of a document."""
        ...


class InMemory:
    """Documents that are at hand, each with a mask or None for all ones.

    `hashes` name their texts (`lclm.data.tokens.text_hash`).
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        masks: Sequence[np.ndarray | None] | None = None,
        hashes: Sequence[int] | None = None,
    ):
        self._documents = documents
        self._masks = masks or [None] * len(documents)
        self.lengths = np.array([len(d) for d in documents], np.int64)
        self.hashes = np.array(hashes or [0] * len(documents), np.uint64)

    def read(self, doc: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of a part of a document."""
        tokens, mask = self._documents[doc][start : start + count], self._masks[doc]
        if mask is None:
            return tokens, np.ones(len(tokens), np.uint8)
        return tokens, mask[start : start + count]


class Packed(Sequence):
    """The rows of a plan, read when they are asked for; `pad` fills their ends."""

    def __init__(self, documents: Documents, plan: Plan, *, pad: int = 0):
        self._documents, self.plan, self._pad = documents, plan, pad

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, row: int) -> Row:
        size = self.plan.length + 1
        tokens = np.full(size, self._pad, np.int32)
        segments, mask = np.zeros(size, np.int32), np.zeros(size, np.uint8)
        at = 0
        for i, (doc, start, count) in enumerate(self.plan.spans(row)):
            to = slice(at, at + count)
            tokens[to], mask[to] = self._documents.read(doc, start, count)
            segments[to] = i + 1
            at += count
        return {"tokens": tokens, "segments": segments, "mask": mask}
