"""What a run cost: tokens, cache bytes and tokens a second, by way of reading."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lclm.evals.base import Panel, Record, Summary, show, show_bytes, to_csv

NOTE = (
    "Peak cache: the most bytes that the policy held for one text. Tokens/s: medians "
    "over the records; a perplexity's leaves out its first chunk, which compiles. A "
    "dash: its records do not tell."
)
HEADER = ("task", "reading", "records", "tokens", "cache_bytes")
HEADER += ("tokens_per_second", "new_tokens_per_second", "seconds")


@dataclass(frozen=True)
class Cost:
    """What the records of one task and one way of reading say they took."""

    task: str
    reading: str
    records: int
    tokens: int
    cache_bytes: int | None
    tokens_per_second: float | None
    new_tokens_per_second: float | None
    seconds: float

    @classmethod
    def of(cls, task: str, reading: str, records: Sequence[Record]) -> "Cost":
        """tokens: of all prompts; cache_bytes: the most of one record."""

        def known(name: str) -> list:
            return [r[name] for r in records if r.get(name) is not None]

        def middle(name: str) -> float | None:
            return statistics.median(known(name)) if known(name) else None

        return cls(
            task,
            reading,
            len(records),
            sum(known("prompt_tokens") or known("tokens")),
            max(known("cache_bytes"), default=None),
            middle("tokens_per_second"),
            middle("new_tokens_per_second"),
            sum(known("seconds")),
        )

    def row(self) -> tuple[str, ...]:
        """The table's cells."""
        return (
            f"{self.task}: {self.reading}",
            f"{self.records:,}",
            f"{self.tokens:,}",
            show_bytes(self.cache_bytes),
            show(self.tokens_per_second, ",.0f"),
            show(self.new_tokens_per_second, ",.1f"),
            show(self.seconds, ",.0f"),
        )


def readings(records: Iterable[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Records by model, cache and strategy, "" for what a record does not name."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        way = tuple(record.get(name) or "" for name in ("model", "cache", "strategy"))
        found.setdefault(way, []).append(record)
    return found


def reading_name(way: Iterable[str]) -> str:
    """Run, model, cache, strategy in one line: what is named, and once."""
    return ", ".join(dict.fromkeys(word for word in way if word))


def costs(task: str, records: Iterable[Record]) -> list[Cost]:
    """A cost for each way of reading of a task."""
    found = readings(records)
    return [Cost.of(task, reading_name(way), its) for way, its in found.items()]


def summary(found: Sequence[Cost], note: str = NOTE) -> Summary:
    """The costs as a table and a CSV file."""
    columns = ("reading", "records", "tokens read", "peak cache")
    columns += ("read tokens/s", "written tokens/s", "seconds")
    panel = Panel("Cost", columns, tuple(c.row() for c in found), note)
    rows = [tuple(getattr(c, name) for name in HEADER) for c in found]
    return Summary((panel,), {}, {"cost.csv": to_csv(HEADER, rows)})
