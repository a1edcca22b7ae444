"""What reading and generating return."""

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Stats:
    """Measured facts of one request: bytes, seconds, tokens.

    bytes: cache arrays really allocated, all rows and layers. kept: tokens per kv head
    that stay between calls (None keeps all).
    """

    bytes: int = 0
    kept: int | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second of decoding; tokens read a second if none were made."""
        if self.new_tokens and self.decode_seconds:
            return self.new_tokens / self.decode_seconds
        return (
            self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0
        )


@dataclass
class Generation:
    """A continuation: `tokens` without the prompt and without end-of-text."""

    text: str | None
    tokens: list[int]
    stats: Stats


@dataclass
class Stream:
    """Iterate for pieces of text (or tokens) as they come; then read `result`."""

    pieces: Iterator
    result: Generation | None = field(default=None)

    def __iter__(self) -> Iterator:
        return self.pieces
