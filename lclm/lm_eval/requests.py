"""What lm-eval's requests mean in tokens and in options of `generate`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lclm.errors import LclmError, did_you_mean

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DRAWN = ("top_k", "top_p", "min_p")
KNOWN = (*LENGTHS, "until", "do_sample", "temperature", *DRAWN, "num_beams")


@dataclass(frozen=True)
class Generate:
    """How a prompt is continued: greedily unless `temperature` is above 0."""

    new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    drawn: tuple[tuple[str, Any], ...] = field(default=())

    @classmethod
    def read(cls, told: Mapping[str, Any], *, default: int) -> "Generate":
        """From a task's generation_kwargs; `default` new tokens where none are told.

        As in lm-eval, the first of `LENGTHS` counts, and do_sample=false is greedy
        whatever the temperature. Raises LclmError for what lclm cannot do.
        """
        for key in told:
            if key not in KNOWN:
                raise LclmError(
                    f"generation option {key!r} is unknown here: known are "
                    f"{', '.join(KNOWN)}{did_you_mean(key, KNOWN)}"
                )
        if told.get("num_beams") not in (None, 1):
            raise LclmError(
                f"num_beams is {told['num_beams']!r}: there is no beam search here, "
                "give --gen_kwargs num_beams=1"
            )
        lengths = (told[key] for key in LENGTHS if told.get(key) is not None)
        until = told.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        temperature = float(told.get("temperature") or 0.0)
        drawn = ()
        if told.get("do_sample") is False:
            temperature = 0.0
        elif told.get("do_sample") and "temperature" not in told:
            temperature = 1.0
        if temperature:
            # Here as in transformers, 0 of `top_k` means all tokens.
            drawn = tuple((key, told[key]) for key in DRAWN if told.get(key))
        return cls(int(next(lengths, default)), stop, temperature, drawn)


def windows(
    tokens: Sequence[int], *, first: int, longest: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    """(read before, scored) pieces of a text in which every token is scored once.

    `first` stands before the text. Without `longest` the text is one piece; else a
    piece and what is read before it are at most `longest` tokens and one, by lm-eval's
    rule: pieces are disjoint, and the last is given all the context that fits.
    """
    longest = longest or max(len(tokens), 1)
    for start in range(0, len(tokens), longest):
        scored = list(tokens[start : start + longest])
        end = start + len(scored)
        before = [first] if start == 0 else list(tokens[end - longest - 1 : start])
        yield before, scored
