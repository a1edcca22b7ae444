"""A paper's claims, decided: two sides, their values by seed, and one strict rule.

A side's mean over seeds has a 95% t-interval; that of a score in [0, 1] is at least
Wilson's interval of as many answers (Wilson 1927, JASA 22), since seeds that agree say
nothing of the questions that were not asked. Where both sides have the same seeds (the
same texts, the same trained models), intervals of other measures are within seeds
(Morey 2008, Tutor. Quant. Methods Psychol. 4): a text that is hard for both sides tells
them apart no less. "reproduced": both sides have at least `SEEDS` seeds and the low
side's interval ends below the beginning of the high side's; "did not reproduce": the
other way about; "undecided" otherwise.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.special import ndtri, stdtrit

from lclm.errors import did_you_mean
from lclm.evals.base import Panel, Record, Summary, require, show, to_csv

SEEDS = 3
REPRODUCED, FAILED, UNDECIDED = "reproduced", "did not reproduce", "undecided"
RULE = (
    "Means over seeds with 95% t-intervals, those of scores at least Wilson's interval "
    "of all answers, those of other measures within seeds where both sides have the "
    "same (Cousineau-Morey: what makes a text hard for both is left out). Reproduced: "
    "at least 3 seeds a side, and the low side's interval ends below the high side's; "
    "did not reproduce: the other way about; else undecided."
)
COLUMNS = ("verdict", "claim", "the paper", "measure", "low", "high", "high - low")
HEADER = ("claim", "paper", "measure", "side", "picks", "seed", "value")
HEADER += ("mean", "interval_low", "interval_high", "verdict")


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper and the records that decide it: low is below high.

    says: the claim. paper: where it stands, and the figure there. measure: "nll" (mean
    loss of a record's tokens in nats, of positions `span` alone where given) or any
    number that records have, such as "score" and "tokens_per_second". low, high: the
    fields by which records are of a side; a list of values takes any of them. stage:
    titles of the stages whose records decide. seed: the field that tells one seed from
    another. paired: the values that both sides list of that field are of the same seeds
    in the same order, as models that started from the same one are. margin: how far the
    low side may be above the high one.
    """

    says: str
    paper: str
    measure: str
    low: dict
    high: dict
    stage: tuple[str, ...]
    seed: str = "seed"
    span: tuple[int, ...] = ()
    margin: float = 0.0
    paired: bool = False

    def __post_init__(self):
        for name in ("says", "paper", "measure", "seed"):
            require(bool(getattr(self, name)), f"{name} is empty: a claim needs it")
        require(bool(self.stage), "stage is empty: name the stage whose records decide")
        for name in ("low", "high"):
            require(
                bool(getattr(self, name)),
                f"{name} is empty: give the fields of a record that pick this side, "
                "as in dict(cache='full')",
            )
        require(self.low != self.high, f"low and high are the same side, {self.low}")
        good = not self.span or (
            len(self.span) == 2 and 0 <= self.span[0] < self.span[1]
        )
        require(good, f"span is {self.span}; give [from, to], positions in tokens")
        require(
            not self.span or self.measure == "nll",
            f"span={self.span} with measure={self.measure!r}: only 'nll' has positions",
        )
        counts = [
            len(_wanted(side.get(self.seed, ()))) for side in (self.low, self.high)
        ]
        require(
            not self.paired or counts[0] == counts[1] > 0,
            f"paired=True and the sides list {counts[0]} and {counts[1]} values of "
            f"{self.seed!r}: list as many, those of one seed at one place",
        )
        require(self.margin >= 0, f"margin is {self.margin}; it must be at least 0")

    @property
    def measured(self) -> str:
        """What a table calls the measure."""
        words = self.measure + (" at {}-{}".format(*self.span) if self.span else "")
        return words + (f", margin {self.margin:g}" if self.margin else "")


@dataclass(frozen=True)
class Estimate:
    """Mean of one value a seed, and its 95% interval (unbounded below 2 seeds).

    answers: how many scores in [0, 1] the values average; 0 for other measures. within:
    half the width where the same seeds have another side (`paired`).
    """

    values: Mapping[Any, float]
    answers: int = 0
    within: float | None = None

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return math.fsum(self.values.values()) / len(self.values)

    @property
    def half(self) -> float:
        """Half the width of the interval: t(n - 1) s / sqrt(n)."""
        if self.within is not None:
            return self.within
        n, mean = len(self.values), self.mean
        if n < 2:
            return math.inf
        squares = math.fsum((v - mean) ** 2 for v in self.values.values())
        return float(stdtrit(n - 1, 0.975)) * math.sqrt(squares / (n - 1) / n)

    @property
    def interval(self) -> tuple[float, float]:
        """Student's, made as wide as Wilson's where the values are of answers."""
        low, high = self.mean - self.half, self.mean + self.half
        if not self.answers:
            return low, high
        least, most = wilson(self.mean, self.answers)
        return max(min(low, least), 0.0), min(max(high, most), 1.0)

    def show(self) -> str:
        """`3.21 [3.09, 3.33] (3 seeds)`."""
        n, (low, high) = len(self.values), self.interval
        seeds = f"({n} seed{'s' * (n != 1)})"
        if n < 2:
            return f"{self.mean:.4g} {seeds}"
        scale = (high - low) / 2 or abs(self.mean) or 1
        digits = min(max(2 - math.floor(math.log10(scale)), 0), 6)
        numbers = (f"{v:.{digits}f}" for v in (self.mean, low, high))
        return "{} [{}, {}] {}".format(*numbers, seeds)


def paired(low: Estimate, high: Estimate) -> tuple[Estimate, Estimate]:
    """Both with intervals within seeds, where they have the same (Morey 2008).

    Of two sides that is the interval of their difference over sqrt(2): a seed's own
    level, which both share, is no part of it. Scores keep the intervals of their
    answers.
    """
    if low.answers or high.answers or low.values.keys() != high.values.keys():
        return low, high
    apart = {seed: high.values[seed] - value for seed, value in low.values.items()}
    within = Estimate(apart).half / math.sqrt(2)
    return replace(low, within=within), replace(high, within=within)


def wilson(share: float, answers: int) -> tuple[float, float]:
    """The 95% score interval of a share of `answers` right answers."""
    z = float(ndtri(0.975)) ** 2 / answers
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(z * share * (1 - share) + z * z / 4) / (1 + z)
    return middle - half, middle + half


@dataclass(frozen=True)
class Decision:
    """A claim with what was measured of its sides."""

    claim: Claim
    low: Estimate
    high: Estimate

    @property
    def verdict(self) -> str:
        """The rule of this file, with the claim's margin on the high side."""
        low, high = self.low, self.high
        if min(len(low.values), len(high.values)) < SEEDS:
            return UNDECIDED
        margin = self.claim.margin
        if low.interval[1] < high.interval[0] + margin:
            return REPRODUCED
        apart = high.interval[1] + margin < low.interval[0]
        return FAILED if apart else UNDECIDED

    @property
    def difference(self) -> Estimate | None:
        """High minus low over the seeds that both have; None where there is none."""
        both = {s: v - self.low.values[s] for s, v in self.high.values.items()
                if s in self.low.values}  # fmt: skip
        return Estimate(both) if both else None

    def row(self) -> tuple[str, ...]:
        """The table's cells."""
        claim, difference = self.claim, self.difference
        return (
            self.verdict,
            claim.says,
            claim.paper,
            claim.measured,
            f"{told(claim.low)}: {self.low.show()}",
            f"{told(claim.high)}: {self.high.show()}",
            difference.show() if difference else "-",
        )

    def lines(self) -> list[tuple]:
        """A line of the CSV file for each seed of each side."""
        claim = self.claim
        sides = (("low", claim.low, self.low), ("high", claim.high, self.high))
        return [
            (claim.says, claim.paper, claim.measured, side, told(picks), seed,
             show(value, ".6g"), *_numbers(estimate), self.verdict)
            for side, picks, estimate in sides
            for seed, value in estimate.values.items()
        ]  # fmt: skip


def _numbers(estimate: Estimate) -> tuple[str, str, str]:
    mean = show(estimate.mean, ".6g")
    if len(estimate.values) < 2:
        return mean, "", ""
    return (mean, *(show(v, ".6g") for v in estimate.interval))


def told(picks: Mapping[str, Any]) -> str:
    """The fields of a side in words."""
    return ", ".join(
        f"{name}={' | '.join(map(str, _wanted(value)))}"
        for name, value in picks.items()
    )


def decide(claim: Claim, records: Sequence[Record]) -> Decision:
    """The claim's two sides, measured.

    `records` carry "stage", the title of theirs; a perplexity's title is its "label".

    Raises:
      LclmError: a side picks no record, or its records lack the measure or the seed.
    """
    known = [labelled(r) for r in records if r["stage"] in claim.stage]
    low, high = (_side(claim, side, known) for side in ("low", "high"))
    return Decision(claim, *paired(low, high))


def labelled(record: Record) -> Record:
    """The record with its reading's title under the name that configs give it."""
    return {"label": record["title"], **record} if "title" in record else record


def _side(claim: Claim, side: str, records: Sequence[Record]) -> Estimate:
    picks = getattr(claim, side)
    where = f"claim {claim.says!r}, {side} side {told(picks)}"
    mine = [r for r in records if _is_of(r, picks)]
    require(bool(mine), f"{where}: no record of stage {' | '.join(claim.stage)} is "
            f"picked; {_why_none(picks, records)}")  # fmt: skip
    _check_field(where, "seed", claim.seed, mine)
    _check_field(where, "measure", claim.measure, mine)
    found: dict[Any, list[tuple[float, float]]] = {}
    for record in mine:
        for value, weight in _measured(claim, record):
            require(
                isinstance(value, int | float),
                f"{where}: {claim.measure} is {value!r}; a measure is a number",
            )
            seed = record[claim.seed]
            if claim.paired:
                seed = _wanted(picks[claim.seed]).index(seed)
            found.setdefault(seed, []).append((float(value), weight))
    require(
        bool(found),
        f"{where}: none of its {len(mine)} records was measured"
        + (f" at positions {claim.span[0]} to {claim.span[1]}" if claim.span else ""),
    )
    means = {
        seed: math.fsum(v * w for v, w in parts) / math.fsum(w for _, w in parts)
        for seed, parts in found.items()
    }
    asked = sum(map(len, found.values())) if claim.measure == "score" else 0
    return Estimate(means, asked)


def _measured(claim: Claim, record: Record) -> Iterable[tuple[Any, float | int]]:
    """Values and their weights; none where a record was skipped."""
    if claim.span:
        low, high = claim.span
        return [(nll, count) for start, end, nll, count, *_ in record["curve"]
                if low <= start and end <= high]  # fmt: skip
    value = record[claim.measure]
    weight = record["tokens"] if claim.measure == "nll" else 1
    return [] if value is None else [(value, weight)]


def _is_of(record: Record, picks: Mapping[str, Any]) -> bool:
    return all(
        name in record and record[name] in _wanted(v) for name, v in picks.items()
    )


def _wanted(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _check_field(where: str, what: str, name: str, records: Sequence[Record]) -> None:
    fields = sorted({n for r in records for n in r})
    require(
        all(name in r for r in records),
        f"{where}: its records have no field {name!r}, its {what}; they have "
        f"{', '.join(fields)}{did_you_mean(name, fields)}",
    )


def _why_none(picks: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Which field no record has, or which values the picked fields have there."""
    fields = sorted({name for r in records for name in r})
    for name in picks:
        if name not in fields:
            return (f"its records have no field {name!r}; they have "
                    f"{', '.join(fields)}{did_you_mean(name, fields)}")  # fmt: skip
    known = (
        f"{name} is " + ", ".join(dict.fromkeys(repr(r.get(name)) for r in records))
        for name in picks
    )
    return "there " + "; ".join(known)


def summary(decisions: Sequence[Decision], *, note: str = "") -> Summary:
    """The claims as a table and a CSV file with every seed."""
    rows = tuple(d.row() for d in decisions)
    panel = Panel("Claims", COLUMNS, rows, " ".join(filter(None, (note, RULE))))
    lines = [line for d in decisions for line in d.lines()]
    return Summary((panel,), {}, {"claims.csv": to_csv(HEADER, lines)})
