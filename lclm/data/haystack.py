"""Texts of an exact token length, and places inside them where a sentence ends."""

from collections.abc import Callable, Sequence

from lclm.errors import LclmError

ENDS = (".", "!", "?")
CLOSERS = "\"'\u2019\u201d\u00bb)]}_* "
WALK = 512


def fit(size: Callable[[int], int], limit: int, *, guess: int) -> int:
    """An `n >= 0` with `size(n) <= limit < size(n + 1)`, for a growing `size`.

    Brackets outward from `guess` in doubling steps, then bisects: a good guess costs
    a handful of calls.

    Raises:
      LclmError: not even `size(0)` is within `limit` tokens.
    """
    low, high, step = max(guess, 0), max(guess, 0) + 1, 1
    while low > 0 and size(low) > limit:
        low, high = max(0, low - step), low
        step *= 2
    if low == 0 and (least := size(0)) > limit:
        raise LclmError(
            f"length {limit} tokens is too short: the prompt without any filler "
            f"takes {least}; use a length of at least {least}"
        )
    while size(high) <= limit:
        low, high = high, high + step
        step *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return low


def repeat_to(ids: Sequence[int], count: int) -> list[int]:
    """The first `count` tokens of `ids` said over and over."""
    if not ids:
        raise LclmError("the haystack has no tokens: give a source with text in it")
    times = -(-count // len(ids))
    return (list(ids) * times)[:count]


def encode_prefix(
    encode: Callable[[str], list[int]], text: str, *, count: int
) -> list[int]:
    """The first `count` tokens of `text`, fewer if it has fewer, without reading on."""
    taken = 8 * count + 1024
    while True:
        ids = encode(text[:taken])
        if len(ids) >= count + 64 or taken >= len(text):
            return ids[:count]
        taken *= 2


def sentence_enders(
    ids: Sequence[int], decode: Callable[[list[int]], str]
) -> frozenset[int]:
    """The ids in `ids` whose text, closing quotes and brackets apart, ends a sentence.

    Looks at decoded text, so it holds for every tokenizer: asking what "." encodes
    to finds BOS, or a word-initial period that never occurs inside a text.
    """
    unique = set(ids)
    texts = {i: decode([i]).rstrip(CLOSERS + "\n") for i in unique}
    return frozenset(i for i, text in texts.items() if text.endswith(ENDS))


def insertion_point(ids: Sequence[int], depth: float, *, enders: frozenset[int]) -> int:
    """Where to insert at `depth` in [0, 1]: the nearest sentence start to the left.

    Without a sentence end within 512 tokens the place is not moved.
    """
    if depth >= 1:
        return len(ids)
    wanted = int(len(ids) * depth)
    for at in range(wanted, max(wanted - WALK, 0) - 1, -1):
        if at == 0 or ids[at - 1] in enders:
            return at
    return wanted
