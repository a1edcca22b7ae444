"""Passkey retrieval: five digits stated once inside filler, asked for at the end.

The task is that of Landmark Attention (arXiv 2305.16300); the text and the
token-exact generator are our own.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lclm.data.haystack import fit
from lclm.evals.asking import check_questions, cost
from lclm.evals.base import (
    Example,
    Journal,
    LanguageModel,
    Observe,
    Query,
    Record,
    Summary,
    Tokenizer,
    require,
    silent,
)
from lclm.evals.retrieval import (
    Asker,
    Cell,
    check_grid,
    run_grid,
    stratified,
    summarise,
)

OPENING = (
    "There is important information hidden inside a lot of irrelevant text. Find it "
    "and memorise it. You will be asked about it at the end.\n"
)
FILLER = (
    "The grass is green and soft.",
    "The sky is blue and wide.",
    "The sun is bright and warm.",
    "Here we walk along the road.",
    "There we turn and come back again.",
)
FACT = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
NEW_TOKENS = 10
SCORES = ("generate", "forced")


def make(
    tokenizer: Tokenizer, *, length: int, depth: float, seed: int, starts: int = 0
) -> Example:
    """A prompt of at most `length` tokens, less than one filler sentence below it.

    `starts` tokens (BOS) that the model adds by itself are counted in. `depth` in
    [0, 1] is the share of the filler before the fact; the same arguments give the same
    example.
    """
    require(0 <= depth <= 1, f"depth is {depth}; allowed is 0 to 1")
    rng = random.Random(f"passkey:{seed}:{length}:{depth}")
    key = str(rng.randint(10000, 99999))

    def parts(sentences: int) -> tuple[str, str]:
        filler = [FILLER[i % len(FILLER)] for i in range(sentences)]
        at = round(depth * sentences)
        before = " ".join(filler[:at]) + "\n"
        return before, FACT.format(key=key) + "\n" + " ".join(filler[at:])

    def size(sentences: int) -> int:
        text = OPENING + "".join(parts(sentences)) + QUESTION
        return starts + len(tokenizer.encode(text))

    overhead = size(0)
    unit = max(1.0, (size(len(FILLER)) - overhead) / len(FILLER))
    count = fit(size, length, guess=int((length - overhead) / unit))
    before, after = parts(count)
    total = size(count)
    meta = {
        "prompt_tokens": total,
        "actual_depth": round(len(tokenizer.encode(OPENING + before)) / total, 4),
        "key": key,
    }
    query = Query(QUESTION, (key,), NEW_TOKENS, gold=FACT.format(key=key))
    return Example(before + after, (query,), OPENING, meta)


def score(example: Example | Query, answer: str) -> float:
    """1 if the first run of digits in the answer is the key, else 0."""
    digits = re.search(r"\d+", answer)
    return float(digits is not None and digits.group() == example.answers[0])


def forced(lm: LanguageModel, example: Example, *, cache: str) -> Record:
    """log p(key | prompt) in nats, and whether greedy decoding spells the key.

    Greedy decoding spells it exactly when every teacher-forced argmax is the key's
    token, so the match costs a few decode steps and never a [T, V] array of logits.
    """
    prompt = lm.encode(example.prompt)
    whole = lm.encode(example.prompt + " " + example.answers[0])
    pairs = zip(prompt, whole, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt))
    nll = np.asarray(lm.nll(np.asarray([whole], np.int32), cache=cache))[0]
    count = len(whole) - shared
    answer = lm.generate(whole[:shared], max_new_tokens=count, cache=cache)
    match = answer.text.strip() == example.answers[0]
    return {
        "log_p": -float(nll[shared - 1 :].sum(dtype=np.float64)),
        "key_tokens": count,
        "prediction": answer.text,
        "score": float(match),
        **cost(answer, answer),
    }


@dataclass(frozen=True)
class Passkey:
    """Accuracy by length and depth. `bins` > 0 draws the depths, one in each of that
    many equal slices per trial (1 is uniform); else `depths` are asked as given.

    `score`: "generate" reads ten greedy tokens, "forced" adds log p(key). `questions`:
    "hidden" reads the context, and compresses it, before the question is known.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    bins: int = 0
    trials: int = 1
    caches: tuple[str, ...] = ("full",)
    score: str = "generate"
    questions: str = "seen"
    seed: int = 0

    SCOPE: ClassVar = ("score",)

    def __post_init__(self):
        check_grid(self.lengths, self.depths, self.caches)
        check_questions(self.questions)
        require(self.trials >= 1, f"trials is {self.trials}; at least 1")
        require(self.bins >= 0, f"bins is {self.bins}; 0 or more")
        require(
            bool(self.depths) or self.bins > 0,
            "depths is empty and bins is 0: give one of them",
        )
        require(self.score in SCORES, f"score is {self.score!r}; allowed are {SCORES}")
        require(
            self.score == "generate" or self.questions == "seen",
            "score='forced' reads the question with the key: use questions='seen'",
        )

    def cells(self) -> list[Cell]:
        """Every question, cache by cache, short lengths first."""
        return [
            Cell(length, depth, self.seed + trial, cache)
            for cache in self.caches
            for length in sorted(self.lengths)
            for trial in range(self.trials)
            for depth in (
                stratified(self.bins, trial=trial, seed=self.seed)
                if self.bins
                else self.depths
            )
        ]

    def examples(self, tokenizer: Tokenizer) -> list[Example]:
        """The distinct questions, in the order of `cells` for one cache."""
        cells = [c for c in self.cells() if c.cache == self.caches[0]]
        return [
            make(tokenizer, length=c.length, depth=c.depth, seed=c.seed) for c in cells
        ]

    def grade(self, example: Example | Query, answer: str) -> float:
        """Score of an answer in [0, 1]."""
        return score(example, answer)

    def run(
        self, lm: LanguageModel, *, journal: Journal, observe: Observe = silent
    ) -> list[Record]:
        """Ask every question not yet in the journal."""

        starts, asker = len(lm.encode("")), Asker(lm, self.questions)

        def ask(example: Example, cell: Cell) -> Record:
            if self.score == "forced":
                return forced(lm, example, cache=cell.cache)
            said = asker.answer(example, cell)
            return {**said, "score": score(example, said["prediction"])}

        return run_grid(
            self.cells(),
            task="passkey",
            questions=self.questions,
            make=lambda c: make(
                lm.tokenizer,
                length=c.length,
                depth=c.depth,
                seed=c.seed,
                starts=starts,
            ),
            ask=ask,
            journal=journal,
            observe=observe,
        )

    def summary(self, records: Sequence[Record], *, trained: int) -> Summary:
        """Accuracy by cache and length; drawn depths are shown by their slice."""
        if self.bins:
            slices = [min(int(r["depth"] * self.bins), self.bins - 1) for r in records]
            centres = [round((s + 0.5) / self.bins, 4) for s in slices]
            records = [{**r, "depth": c} for r, c in zip(records, centres, strict=True)]
        return summarise(
            records,
            title="Passkey retrieval",
            slug="passkey",
            caches=self.caches,
            questions=self.questions,
        )
