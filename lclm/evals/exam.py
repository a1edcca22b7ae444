"""Examples put to one model under several caches and strategies, and their tables."""

import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lclm.data.sources import bind
from lclm.errors import LclmError, unknown
from lclm.evals.asking import (
    MODES,
    TURNS,
    Prompt,
    Task,
    answer_all,
    check_questions,
    converse,
    notes,
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
    Tokenizer,
    by_model,
    require,
    show,
    silent,
)
from lclm.evals.strategies import FILLING, STRATEGIES, Desk, make

Grade = Callable[[Query, str], float]
SHARED = ("whole", "truncate", "closed_book")
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
    modes: whether turns stay, of `MODES`; () asks each question apart and says nothing
    of it in the records.
    """

    caches: tuple[str, ...] = ("full",)
    strategies: tuple[str, ...] = ("whole",)
    questions: str = "hidden"
    budget: int = 0
    chat: bool = False
    modes: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("caches", "strategies", "modes"):
            told = getattr(self, name)
            empty = not told and name != "modes"
            require(not empty, f"{name} is empty: give at least one")
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
        for mode in self.modes:
            if mode not in MODES:
                raise unknown("mode", mode, MODES)
        picking = {s.partition(":")[0] for s in self.strategies} - set(SHARED)
        require(
            not (picking and set(self.modes) & set(TURNS)),
            f"strategies {sorted(picking)} choose a context for one question, and "
            f"turns share theirs: use {', '.join(SHARED)}, or modes=['multi_request']",
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
        between = chat_between(lm) if wrap and set(self.modes) & set(TURNS) else ""
        tasks = []
        told = itertools.product(self.caches, self.strategies, self.modes or ("",))
        for cache, strategy, mode in told:
            way = dict(cache=cache, strategy=strategy, questions=self.questions)
            way |= {"mode": mode} if mode else {}
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

            def turns(example: Example, queries: Sequence[Query], prompt=prompt):
                first, *rest = queries
                made = prompt(example, first)
                if made is None:
                    return [None] * len(queries)
                chat = wrap if example.meta.get("chat", True) else None
                later = [_turn(query, chat, between) for query in rest]
                return [made, *later]

            label = " · ".join(filter(None, (task, cache, strategy, mode)))
            for item, its in zip(items, keys, strict=True):
                put = dict(lm=lm, grade=grade, way=way)
                work = (
                    _talk(item, turns, **put)
                    if mode in TURNS
                    else _work(item, prompt, **put)
                )
                tasks.append(Task(label, its, work))
        return run_tasks(tasks, journal=journal, observe=observe)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """An evaluation made of examples, put to a model as an `Exam`.

    Its fields are those of the exam. A subclass has a `task`, the name in its records,
    `items` and `grade`.
    """

    task: ClassVar[str]

    budget: int = 0
    chat: bool = False
    caches: tuple[str, ...] = ("full",)
    strategies: tuple[str, ...] = ("whole",)
    questions: str = "hidden"

    def exam(self) -> Exam:
        """How the questions are put; raises LclmError where they cannot be."""
        told = (self.caches, self.strategies, self.questions, self.budget, self.chat)
        return Exam(*told)

    def items(self, tokenizer: Tokenizer, starts: int = 0) -> list[Item]:
        """Every question; `starts` tokens (BOS) of the model's own count in lengths."""
        raise NotImplementedError

    def grade(self, query: Query, answer: str) -> float:
        """Score of an answer in [0, 1]."""
        raise NotImplementedError

    def examples(self, tokenizer: Tokenizer) -> list[Example]:
        """Every example, built."""
        return [item.make() for item in self.items(tokenizer)]

    def sittings(self, items: list[Item]) -> Iterable[tuple[Exam, list[Item]]]:
        """Exams, and what is put in each."""
        return [(self.exam(), items)]

    def run(
        self, lm: LanguageModel, *, journal: Journal, observe: Observe = silent
    ) -> list[Record]:
        """Ask every question not yet in the journal."""
        put = dict(lm=lm, grade=self.grade, journal=journal, observe=observe)
        items = self.items(lm.tokenizer, len(lm.encode("")))
        return [
            record
            for exam, part in self.sittings(items)
            for record in exam.run(part, task=self.task, **put)
        ]


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
            said = None if made is None else next(answers)
            yield _record(example, query, said, grade)

    return work


def _talk(item: Item, turns: Callable, *, lm: LanguageModel, grade: Grade, way: dict):
    """One session an example. The turns before a missing one are gone through again,
    so that what is asked of it is what an uninterrupted run asks."""

    def work(missing: Sequence[int]) -> Iterable[Record]:
        example = item.make()
        queries = example.queries[: missing[-1] + 1]
        prompts = turns(example, queries)
        own = way["mode"] == "multi_turn_own"
        put = dict(cache=way["cache"], questions=way["questions"], own=own)
        skipped = prompts[0] is None
        answers = prompts if skipped else converse(lm, prompts, **put)
        for i, (query, said) in enumerate(zip(queries, answers, strict=True)):
            if i in missing:
                yield _record(example, query, said, grade)

    return work


def _record(example: Example, query: Query, said: Record | None, grade: Grade):
    told = {**example.meta, **query.meta, "answers": list(query.answers)}
    if said is None:
        return {**told, "score": None, "skipped": "longer than the budget"}
    return {**told, **said, "score": grade(query, said["prediction"])}


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


def chat_between(lm: LanguageModel) -> str:
    """What the model's template puts between an answer and the next message."""
    roles = ("user", "assistant", "user")
    said = lm.tokenizer.chat([{"role": r, "content": _MARK} for r in roles])
    parts = said.split(_MARK)
    require(len(parts) == 4, "this model's chat template changes its messages")
    return parts[2]


def _turn(query: Query, wrap: tuple[str, str] | None, between: str) -> Prompt:
    """A question behind the answer to the one before."""
    text = query.text
    if wrap:
        text = between + text.removesuffix(query.start) + wrap[1] + query.start
    return Prompt("", text, query)


def _wrapped(prompt: Prompt, wrap: tuple[str, str]) -> Prompt:
    """The start of the answer stays behind the template's own end."""
    start = prompt.query.start
    after = prompt.after.removesuffix(start) + wrap[1] + start
    if not prompt.before:
        return replace(prompt, after=wrap[0] + after)
    return replace(prompt, before=wrap[0] + prompt.before, after=after)


def ways(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Records by model, cache, strategy and mode, named by those of them that vary."""
    found = []
    found, told = [], list(dict.fromkeys(map(_way, records)))
    varies = [len(set(values)) > 1 for values in zip(*told, strict=True)]
    for (model, its), way in itertools.product(by_model(records).items(), told):
        mine = [r for r in its if _way(r) == way]
        named = [model] if model else []
        named += itertools.compress(way, varies)
        if mine:
            found.append((", ".join(named) or way[0], mine))
    return found


def _way(record: Record) -> tuple[str, str, str]:
    return record["cache"], record["strategy"], record.get("mode", "")


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
    told = " ".join([note, notes(records)]).strip()
    return Panel(title, tuple(columns), tuple(rows), told)
