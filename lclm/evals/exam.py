"""Examples put to one model under several caches and strategies, and their tables."""

import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lclm.data.sources import bind
from lclm.errors import LclmError
from lclm.evals.asking import (
    NOTES,
    Prompt,
    Task,
    answer_all,
    check_questions,
    run_tasks,
)
from lclm.evals.base import (
    Example,
    Journal,
    LanguageModel,
    Observe,
    Panel,
    Query,
    Record,
    by_model,
    require,
    show,
)
from lclm.evals.strategies import FILLING, STRATEGIES, Desk, make

Grade = Callable[[Query, str], float]
_MARK = "<<here>>"


@dataclass(frozen=True)
class Item:
    """An example still to be made, the key of its records, how many it asks."""

    key: Record
    make: Callable[[], Example]
    queries: int = 1


@dataclass(frozen=True)
class Exam:
    """How examples are put: every cache with every strategy.

    questions: "hidden" reads contexts before the questions are known. budget: tokens
    of a prompt, 0 for no limit. chat: wrap prompts as the model's template says.
    """

    caches: tuple[str, ...] = ("full",)
    strategies: tuple[str, ...] = ("whole",)
    questions: str = "hidden"
    budget: int = 0
    chat: bool = False

    def __post_init__(self):
        for name in ("caches", "strategies"):
            told = getattr(self, name)
            require(bool(told), f"{name} is empty: give at least one")
            require(len(set(told)) == len(told), f"{name} {told} name one twice")
        for strategy in self.strategies:
            bind(STRATEGIES, strategy)
        check_questions(self.questions)
        require(self.budget >= 0, f"budget is {self.budget}; tokens, or 0 for no limit")
        for name in (s.partition(":")[0] for s in self.strategies):
            require(
                self.budget > 0 or name not in FILLING,
                f"strategy {name!r} fills a budget and budget is 0: give budget=TOKENS",
            )

    def run(
        self,
        items: Sequence[Item],
        *,
        lm: LanguageModel,
        task: str,
        grade: Grade,
        journal: Journal,
        observe: Observe,
    ) -> list[Record]:
        """Ask what the journal lacks, one record on disk after each answer."""
        wrap = chat_wrap(lm) if self.chat else None
        tasks = []
        for cache, strategy in itertools.product(self.caches, self.strategies):
            way = dict(cache=cache, strategy=strategy, questions=self.questions)
            keys = [_keys({"task": task, **item.key, **way}, item) for item in items]
            # What a strategy lacks is said before any model runs, and a finished run
            # needs none of it.
            asked = any(journal.find(**key) is None for some in keys for key in some)
            build = make(strategy) if asked else None
            desk = Desk(lm, self.budget, cache)

            def prompt(example: Example, query: Query, build=build, desk=desk):
                made = build(example, query, desk)
                wrapped = wrap and made and example.meta.get("chat", True)
                return _wrapped(made, wrap) if wrapped else made

            label = f"{task} · {cache} · {strategy}"
            for item, its in zip(items, keys, strict=True):
                work = _work(item, prompt, lm=lm, grade=grade, way=way)
                tasks.append(Task(label, its, work))
        return run_tasks(tasks, journal=journal, observe=observe)


def _keys(base: Record, item: Item) -> tuple[Record, ...]:
    return tuple({**base, "query": i} for i in range(item.queries))


def _work(item: Item, prompt: Callable, *, lm: LanguageModel, grade: Grade, way: dict):
    def work(missing: Sequence[int]) -> Iterable[Record]:
        example = item.make()
        queries = [example.queries[i] for i in missing]
        prompts = [prompt(example, query) for query in queries]
        answers = iter(
            answer_all(
                lm,
                [p for p in prompts if p is not None],
                cache=way["cache"],
                questions=way["questions"],
            )
        )
        for query, made in zip(queries, prompts, strict=True):
            told = {**example.meta, **query.meta, "answers": list(query.answers)}
            if made is None:
                yield {**told, "score": None, "skipped": "longer than the budget"}
            else:
                said = next(answers)
                yield {**told, **said, "score": grade(query, said["prediction"])}

    return work


def fingerprint(example: Example) -> str:
    """What changes when an example's text or first question does, for its key."""
    first = example.queries[0]
    told = (example.opening, example.context, first.text, *first.answers)
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:8]


def chat_wrap(lm: LanguageModel) -> tuple[str, str]:
    """What the model's template puts before and after a user's message.

    Raises:
      LclmError: the model has no template.
    """
    chat = getattr(lm.tokenizer, "chat", None)
    if chat is None:
        raise LclmError("chat=true, and this tokenizer has no chat template: leave it")
    before, mark, after = chat([{"role": "user", "content": _MARK}]).partition(_MARK)
    require(bool(mark), "this model's chat template changes its messages: chat=false")
    return before, after


def _wrapped(prompt: Prompt, wrap: tuple[str, str]) -> Prompt:
    """The start of the answer stays behind the template's own end."""
    start = prompt.query.start
    after = prompt.after.removesuffix(start) + wrap[1] + start
    if not prompt.before:
        return replace(prompt, after=wrap[0] + after)
    return replace(prompt, before=wrap[0] + prompt.before, after=after)


def ways(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Records by model, cache and strategy, each under a name of what varies."""
    found = []
    told = sorted({(r["cache"], r["strategy"]) for r in records}, key=_seen(records))
    caches, strategies = ({t[i] for t in told} for i in (0, 1))
    models = by_model(records)
    for (model, its), (cache, strategy) in itertools.product(models.items(), told):
        mine = [r for r in its if (r["cache"], r["strategy"]) == (cache, strategy)]
        named = [model] if model else []
        alone = len(told) == 1 and not model
        named += [cache] if len(caches) > 1 or alone else []
        named += [strategy] if len(strategies) > 1 else []
        if mine:
            found.append((", ".join(named), mine))
    return found


def _seen(records: Sequence[Record]) -> Callable[[tuple], int]:
    order: dict[tuple, int] = {}
    for record in records:
        order.setdefault((record["cache"], record["strategy"]), len(order))
    return lambda way: order[way]


def mean(records: Iterable[Record]) -> float | None:
    """Mean score of those that were asked, None where none was."""
    scores = [r["score"] for r in records if r["score"] is not None]
    return sum(scores) / len(scores) if scores else None


def table(
    title: str,
    records: Sequence[Record],
    *,
    column: Callable[[Record], Hashable],
    names: dict[Any, str],
    overall: str = "all",
    note: str = "",
) -> Panel:
    """100 x the mean score, a row for each way and a column for each of `names`."""
    rows = []
    for name, mine in ways(records):
        cells = [mean(r for r in mine if column(r) == key) for key in names]
        skipped = sum("skipped" in r for r in mine)
        cells = [*cells, *([mean(mine)] if overall else [])]
        rows.append((name, *(show(c, ".1f", scale=100.0) for c in cells), str(skipped)))
    columns = ["way", *names.values(), *([overall] if overall else []), "skipped"]
    asked = {r["questions"] for r in records}
    notes = " ".join([note, *(NOTES[q] for q in sorted(asked))]).strip()
    return Panel(title, tuple(columns), tuple(rows), notes)
