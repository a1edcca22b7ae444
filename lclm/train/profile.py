"""A profiler trace of chosen steps."""

from pathlib import Path
from typing import Any

import jax


class Profile:
    """Traces steps `span[0]` to `span[1]` into `folder`; nothing for an empty span.

    TensorBoard's profile page and Perfetto read it.
    """

    def __init__(self, span: tuple[int, ...], folder: Path):
        self._span, self._folder, self._open = span, folder, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Start where `step` is the first of the span."""
        if self._span and step == self._span[0]:
            jax.profiler.start_trace(str(self._folder))
            self._open = True

    def after(self, step: int, made: Any) -> None:
        """Stop where `step` was the last, once what it made is there."""
        if self._open and step == self._span[1]:
            jax.block_until_ready(made)
            jax.profiler.stop_trace()
            self._open = False
