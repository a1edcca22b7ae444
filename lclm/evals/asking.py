"""Putting questions to a model: each context read once, each answer kept at once."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lclm.errors import unknown
from lclm.evals.base import Answer, Journal, LanguageModel, Observe, Query, Record

QUESTIONS = ("hidden", "seen")
NOTES = {
    "hidden": "Contexts were read, and compressed, before their questions were known.",
    "seen": "Query-aware: the cache read every question together with its context.",
}
MODES = {
    "multi_request": "Each question met the context as it was first read.",
    "multi_turn": "Earlier questions stayed in the session, with the wanted answers.",
    "multi_turn_own": "Earlier questions stayed, with the model's own answers.",
}
TURNS = ("multi_turn", "multi_turn_own")
FIRST_SEEN = (
    "Query-aware in the first turn: the cache read that question with the context."
)
FINEST = 64


def check_questions(questions: str) -> None:
    """Refuse a way of asking that is not one."""
    if questions not in QUESTIONS:
        raise unknown("way of asking", questions, QUESTIONS)


def notes(records: Iterable[Record]) -> str:
    """What tables of these records say about how questions met their contexts."""
    told: dict[str, None] = {}
    for record in sorted(records, key=lambda r: (r["questions"], r.get("mode", ""))):
        mode, seen = record.get("mode"), record["questions"] == "seen"
        told[FIRST_SEEN if seen and mode in TURNS else NOTES[record["questions"]]] = (
            None
        )
        told |= {MODES[mode]: None} if mode else {}
    return " ".join(told)


@dataclass(frozen=True)
class Task:
    """Measurements made together: their keys, and the work that yields their records.

    `work` gets the indices of the keys that the journal lacks, in order.
    """

    label: str
    keys: tuple[Record, ...]
    work: Callable[[Sequence[int]], Iterable[Record]]


def run_tasks(
    tasks: Sequence[Task], *, journal: Journal, observe: Observe
) -> list[Record]:
    """Do what the journal lacks, one record on disk after each measurement."""
    totals: dict[str, int] = {}
    for task in tasks:
        totals[task.label] = totals.get(task.label, 0) + len(task.keys)
    done = dict.fromkeys(totals, 0)
    records = []
    for task in tasks:
        observe(task.label, done[task.label], totals[task.label])
        found = [journal.find(**key) for key in task.keys]
        missing = [i for i, record in enumerate(found) if record is None]
        results = zip(missing, task.work(missing), strict=True) if missing else ()
        for i, result in results:
            found[i] = journal.add({**task.keys[i], **result})
        records += found
        done[task.label] += len(task.keys)
        observe(task.label, done[task.label], totals[task.label])
    return records


def roomy(tokens: int) -> int:
    """The next of a few lengths: 4 an octave, so that few shapes are compiled."""
    step = max(FINEST, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Prompt:
    """What is read ahead of a question, and what is read with it."""

    before: str
    after: str
    query: Query


def answer_all(
    lm: LanguageModel, prompts: Sequence[Prompt], *, cache: str, questions: str
) -> Iterable[Record]:
    """The greedy answer to each prompt; neighbours with one `before` share its reading.

    "seen" reads both parts as one text, for each prompt anew. The first of those that
    share a context bears the seconds of its reading.
    """
    held = context = None
    for i, prompt in enumerate(prompts):
        start = time.perf_counter()
        alone = questions == "seen" or not prompt.before
        before = prompt.before + prompt.after if alone else prompt.before
        read = None
        if before != held:
            ids = first_tokens(lm, before)
            context = None
        if alone:
            new = prompt.query.max_new_tokens
            room = roomy(len(ids) + new) - len(ids)
            said = lm.generate(ids, max_new_tokens=new, cache=cache, room=room)
            asked, read = 0, said
        else:
            if context is None:
                room = _room(lm, prompts[i:], len(ids))
                read = context = lm.prefill(ids, cache=cache, room=room)
            asked = len(lm.tokenizer.encode(prompt.after))
            said = context.generate(
                prompt.after, max_new_tokens=prompt.query.max_new_tokens
            )
        held = before
        yield {
            "prediction": said.text,
            "prompt_tokens": len(ids) + asked,
            "seconds": time.perf_counter() - start,
            **cost(said, read),
        }


def converse(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    cache: str,
    questions: str,
    own: bool,
) -> Iterable[Record]:
    """The greedy answer to each prompt in one session, in which the turns before stay.

    The context is the first prompt's; "seen" reads the first question with it. Behind
    a question stays the wanted answer, or with `own` what the model said.
    """
    start = time.perf_counter()
    first = prompts[0]
    together = questions == "seen" or not first.before
    ids = first_tokens(lm, first.before + first.after if together else first.before)
    turns = ["" if together and p is first else p.after for p in prompts]
    lefts = [turn + _left(p) for turn, p in zip(turns, prompts, strict=True)]
    read, new = len(ids), sum(p.query.max_new_tokens for p in prompts)
    most = read + new + sum(len(lm.tokenizer.encode(left)) for left in lefts)
    context = lm.prefill(ids, cache=cache, room=roomy(most) - read)
    for turn, left, prompt in zip(turns, lefts, prompts, strict=True):
        said = context.generate(
            turn, max_new_tokens=prompt.query.max_new_tokens, keep=own
        )
        yield {
            "prediction": said.text,
            "prompt_tokens": read + len(lm.tokenizer.encode(turn)),
            "seconds": time.perf_counter() - start,
            **cost(said, context if prompt is first else None),
        }
        start = time.perf_counter()
        stays = turn + said.text if own else left
        read += len(lm.tokenizer.encode(stays))
        if not own and prompt is not prompts[-1]:
            context.generate(stays, max_new_tokens=0, keep=True)


def _left(prompt: Prompt) -> str:
    """The wanted answer as it stands behind its question."""
    gap = "" if prompt.after[-1:].isspace() else " "
    return gap + prompt.query.perfect


def cost(said: Answer, read: Any = None) -> Record:
    """Cache bytes, and tokens a second read and written, where the model tells them.

    read: whose reading this answer bears: the answer's own, that of a context, or None
    where an answer before it did.
    """
    made = getattr(said, "stats", None)
    if made is None:
        return {}
    found = {"cache_bytes": made.bytes}
    if read is not None and read.stats.prefill_seconds:
        rate = read.stats.prompt_tokens / read.stats.prefill_seconds
        found["tokens_per_second"] = rate
    if made.new_tokens and made.decode_seconds:
        found["new_tokens_per_second"] = made.new_tokens / made.decode_seconds
    return found


def first_tokens(lm: LanguageModel, text: str) -> list[int]:
    """Tokens of a first text; a template's own start token is not said twice."""
    ids, start = lm.encode(text), lm.encode("")
    twice = start and ids[len(start) : 2 * len(start)] == start
    return ids[len(start) :] if twice else ids


def _room(lm: LanguageModel, prompts: Sequence[Prompt], read: int) -> int:
    """Tokens for the longest question and answer of the prompts that share a text."""
    sharing = [p for p in prompts if p.before == prompts[0].before]
    longest = max(
        len(lm.tokenizer.encode(p.after)) + p.query.max_new_tokens for p in sharing
    )
    return roomy(read + longest) - read
