"""From a data description to batches, in an order that depends on nothing but it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lclm.data import sources
from lclm.data.batch import make_batch
from lclm.errors import LclmError
from lclm.typing import Batch


@dataclass(frozen=True)
class DataSpec:
    """Where tokens come from: `source` as `lclm.data.sources` spells it."""

    source: str


@runtime_checkable
class Batches(Protocol):
    """Endless batches that can say where they are, and go on from there."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """A JSON-able place between two batches."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a place that `get_state` gave."""
        ...


def open_batches(
    spec: DataSpec, encode: Any, *, batch: int, length: int, seed: int
) -> Batches:
    """Batches of `batch` rows of `length` tokens; `encode` turns text into ids."""
    tokens = np.asarray(encode(sources.read(spec.source)), np.int32)
    return Chunks(tokens, batch=batch, length=length, seed=seed)


class Chunks(Iterator):
    """Rows cut one after the other from one long text, shuffled anew each epoch."""

    def __init__(self, tokens: np.ndarray, *, batch: int, length: int, seed: int):
        count = (len(tokens) - 1) // length
        if count < 1:
            raise LclmError(
                f"the text has {len(tokens)} tokens: too few for one row of "
                f"{length} + 1; give more text or a shorter length"
            )
        self._tokens, self._batch, self._length = tokens, batch, length
        self._count, self._seed, self._next = count, seed, 0

    def __next__(self) -> Batch:
        index = np.arange(self._next, self._next + self._batch)
        self._next += self._batch
        rows = [self._row(int(i)) for i in index]
        return make_batch(np.stack(rows))

    def _row(self, index: int) -> np.ndarray:
        epoch, at = divmod(index, self._count)
        order = np.random.default_rng((self._seed, epoch)).permutation(self._count)
        start = int(order[at]) * self._length
        return self._tokens[start : start + self._length + 1]

    def get_state(self) -> dict[str, Any]:
        """The number of the next row."""
        return {"next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with that row."""
        self._next = int(state["next"])
