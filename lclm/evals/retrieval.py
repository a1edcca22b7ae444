"""The grid that passkey and needle share: lengths x depths x trials x caches."""

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lclm.evals import figures
from lclm.evals.asking import (
    NOTES,
    Prompt,
    Task,
    answer_all,
    cost,
    roomy,
    run_tasks,
)
from lclm.evals.base import (
    Answer,
    Example,
    Journal,
    LanguageModel,
    Observe,
    Panel,
    Reader,
    Record,
    Summary,
    by_model,
    require,
    row_name,
    show,
    to_csv,
)

LISTED = 16
CHUNK = 512  # a prompt is gone back in by as many tokens as are read at a time


@dataclass(frozen=True)
class Cell:
    """One question of a grid: prompt tokens, requested depth in [0, 1], seed."""

    length: int
    depth: float
    seed: int
    cache: str


def check_grid(
    lengths: Sequence[int], depths: Sequence[float], caches: Sequence[str]
) -> None:
    """Refuse an empty grid, a length below 1, a depth outside [0, 1]."""
    require(bool(lengths), "lengths is empty: give at least one length in tokens")
    require(bool(caches), "caches is empty: give at least one cache policy")
    require(len(set(caches)) == len(caches), f"caches {caches} name one policy twice")
    for length in lengths:
        require(length >= 1, f"length is {length}; it must be at least 1 token")
    for depth in depths:
        require(
            0 <= depth <= 1,
            f"depth is {depth}; allowed is 0 (start of the text) to 1 (its end)",
        )


def stratified(bins: int, *, trial: int, seed: int) -> tuple[float, ...]:
    """A depth drawn uniformly from each of `bins` equal slices of [0, 1]."""
    rng = random.Random(f"depths:{seed}:{trial}")
    return tuple(round((b + rng.random()) / bins, 4) for b in range(bins))


def run_grid(
    cells: Sequence[Cell],
    *,
    task: str,
    questions: str,
    make: Callable[[Cell], Example],
    ask: Callable[[Example, Cell], Record],
    journal: Journal,
    observe: Observe,
) -> list[Record]:
    """Ask every cell that the journal lacks, one record on disk after each."""
    # Records without the word are those of runs that saw the question.
    way = {} if questions == "seen" else {"questions": questions}

    def entry(cell: Cell) -> Task:
        key = dict(task=task, **dataclasses.asdict(cell), **way)

        def work(_: Sequence[int]) -> Iterable[Record]:
            example = make(cell)
            meta = {**example.meta, "answers": list(example.answers)}
            start = time.perf_counter()
            found = ask(example, cell)
            yield {**meta, **found, "seconds": time.perf_counter() - start}

        return Task(f"{task} · {cell.cache}", (key,), work)

    return run_tasks([entry(c) for c in cells], journal=journal, observe=observe)


class Asker:
    """Puts the questions of a grid to a model.

    Questions that are read with their contexts share one cache where it holds every
    token: of a prompt that begins like the one before, the rest alone is read.
    """

    def __init__(self, lm: LanguageModel, questions: str):
        self.lm, self.questions = lm, questions
        self.cache, self.shares = "", False
        self.context, self.ids, self.most = None, [], 0

    def answer(self, example: Example, cell: Cell) -> Record:
        """The model's greedy answer as a prediction, and what it cost."""
        query = example.query
        new = query.max_new_tokens
        if self.questions != "seen":
            prompt = Prompt(example.opening + example.context, query.text, query)
            (said,) = answer_all(
                self.lm, [prompt], cache=cell.cache, questions=self.questions
            )
            return {
                k: v for k, v in said.items() if k not in ("prompt_tokens", "seconds")
            }
        if cell.cache != self.cache:
            self.cache, self.shares = cell.cache, self.lm.resumes(cell.cache)
            self.context, self.ids = None, []
        if self.shares:
            said, read = self._behind(example.prompt, new, cell.cache)
        else:
            said = read = self.lm.generate(
                example.prompt, max_new_tokens=new, cache=cell.cache
            )
        return {"prediction": said.text, **cost(said, read)}

    def _behind(self, prompt: str, new: int, cache: str) -> tuple[Answer, Reader]:
        """The answer, and who read what of the prompt was not held."""
        ids = self.lm.encode(prompt)
        alike = (a == b for a, b in zip(ids, self.ids, strict=False))
        at = min(sum(itertools.takewhile(bool, alike)), len(ids) - 1)
        at -= at % CHUNK
        if at and len(ids) + new <= self.most:
            self.context.resume(ids[at:], at)
        else:
            self.context = None  # its memory goes before the next is allocated
            self.most = roomy(len(ids) + new)
            room = self.most - len(ids)
            self.context = self.lm.prefill(ids, cache=cache, room=room)
        self.ids = ids
        said = self.context.generate("", max_new_tokens=new, keep=True)
        return said, self.context


def grid_of(records: Sequence[Record], field: str = "score") -> tuple:
    """Lengths, depths, and the mean of `field` as [depth, length] (NaN: not asked)."""
    lengths = sorted({r["length"] for r in records})
    depths = sorted({r["depth"] for r in records})
    means = np.full((len(depths), len(lengths)), np.nan)
    counts = np.zeros(means.shape, int)
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            values = [
                r[field]
                for r in records
                if r["length"] == length and r["depth"] == depth
            ]
            if values:
                means[row, column] = sum(values) / len(values)
                counts[row, column] = len(values)
    return lengths, depths, means, counts


def summarise(
    records: Sequence[Record],
    *,
    title: str,
    slug: str,
    caches: Sequence[str],
    questions: str = "seen",
) -> Summary:
    """A table of scores by length, a CSV of every cell, heatmaps by model and cache."""
    lengths = sorted({r["length"] for r in records})
    models = by_model(records)
    first = "cache" if set(models) <= {""} else "model"
    rows, images, lines, answers = [], {}, [], []
    ways = [
        (model, cache, mine)
        for (model, its), cache in itertools.product(models.items(), caches)
        if (mine := [r for r in its if r["cache"] == cache])
    ]
    for number, (model, cache, mine) in enumerate(ways):
        name = row_name(model, cache, len(caches))
        rows.append((name, *(_share(mine, n) for n in lengths), _share(mine, None)))
        grid = grid_of(mine)
        lines += [(name, *cell) for cell in _cells(*grid)]
        answers += [_answer(name, r) for r in mine]
        if grid[2].size > 2:
            suffix = f"_{number + 1}" if len(ways) > 1 else ""
            images[f"{slug}{suffix}.png"] = figures.heatmap(
                grid[2], lengths=grid[0], depths=grid[1], title=f"{title} · {name}"
            )
    columns = (first, *(f"{n:,} tokens" for n in lengths), "all")
    header = (first, "length", "depth", "score", "n")
    panels = [Panel(title, columns, tuple(rows), NOTES[questions])]
    if 0 < len(records) <= LISTED:
        columns = (first, "prompt tokens", "depth", "wanted", "model said", "score")
        panels.append(Panel(f"{title}: answers", columns, tuple(answers)))
    return Summary(tuple(panels), images, {f"{slug}.csv": to_csv(header, lines)})


def _answer(name: str, record: Record) -> tuple[str, ...]:
    """One question: what was wanted and what the model said."""
    return (
        name,
        f"{record['prompt_tokens']:,}",
        f"{record['actual_depth']:.0%}",
        ", ".join(record["answers"]),
        " ".join(record["prediction"].split()),
        show(record["score"], ".3g"),
    )


def _share(records: Sequence[Record], length: int | None) -> str:
    values = [r["score"] for r in records if length in (None, r["length"])]
    if not values:
        return "-"
    total = sum(values)
    return f"{show(total, '.3g')}/{len(values)}"


def _cells(
    lengths: list[int], depths: list[float], means: np.ndarray, counts: np.ndarray
) -> Iterator[tuple[Any, ...]]:
    for column, length in enumerate(lengths):
        for row, depth in enumerate(depths):
            if counts[row, column]:
                yield length, depth, float(means[row, column]), int(counts[row, column])
