"""`lclm bench`: how fast this model reads and writes on this machine."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lclm.cli import options

if TYPE_CHECKING:
    from lclm.language_model import LanguageModel


def main(argv: Sequence[str]) -> None:
    """Print a table of tokens a second and cache bytes."""
    parser = options.Parser("bench", "Prefill and decode speed: medians, warmed up.")
    options.model_options(parser)
    parser.add_argument(
        "--lengths", type=options.lengths, default="512,2k", help="prompts, e.g. 2k,32k"
    )
    parser.add_argument("--new", type=options.positive, default=64)
    parser.add_argument("--batch", type=options.positive, default=1)
    parser.add_argument("--repeats", type=options.positive, default=3)
    options.cache_options(parser)
    args = parser.parse_args(argv)

    from rich.console import Console
    from rich.table import Table

    from lclm.serve.memory import format_bytes

    lm = endless(options.load(args))
    table = Table("prompt", "prefill tok/s", "decode tok/s", "cache", title=args.model)
    for length in args.lengths:
        runs = [
            measure(lm, length, args.new, batch=args.batch, cache=args.cache)
            for _ in range(args.repeats + 1)
        ][1:]
        table.add_row(
            f"{args.batch} x {length:,}",
            f"{statistics.median(r['prefill'] for r in runs):,.1f}",
            f"{statistics.median(r['decode'] for r in runs):,.1f}",
            format_bytes(max(r["bytes"] for r in runs)),
        )
    Console().print(table)


def endless(lm: "LanguageModel") -> "LanguageModel":
    """The same model without an end-of-text token, so that it writes what is asked."""
    config = dataclasses.replace(lm.config, eos=())
    return type(lm)(config, lm.params, lm.tokenizer, dtype=lm.dtype)


def measure(
    lm: "LanguageModel", length: int, new: int, *, batch: int = 1, cache: str = "full"
) -> dict[str, Any]:
    """Tokens a second over the whole batch, read and written; seconds; cache bytes.

    The prompts are fixed token ids: speed does not depend on what they say.
    """
    made = lm.generate(prompts(lm.config.vocab, length, batch), new, cache=cache)
    stats = made[0].stats
    return {
        "prefill": stats.prompt_tokens / max(stats.prefill_seconds, 1e-9),
        "decode": stats.new_tokens / max(stats.decode_seconds, 1e-9),
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "new_tokens": stats.new_tokens,
        "bytes": stats.bytes,
    }


def prompts(vocab: int, length: int, batch: int) -> list[list[int]]:
    """Rows of ordinary token ids, the same on every machine; the first 256 are left
    out, where vocabularies keep their special tokens."""
    low = min(256, vocab // 2)
    return [
        [low + (7919 * i + 104729 * row) % (vocab - low) for i in range(length)]
        for row in range(batch)
    ]
