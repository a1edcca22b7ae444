"""lm-eval's requests answered by a language model under a cache policy.

Nothing here imports lm-eval: a request is any object with `args`.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lclm import cache as policies
from lclm.data.tokens import fingerprint
from lclm.errors import LclmError
from lclm.evals.asking import first_tokens, roomy
from lclm.language_model import LanguageModel, Policy
from lclm.lm_eval.requests import Generate, windows

Tokens = tuple[int, ...]
Likelihood = tuple[float, bool]


class Answers:
    """The methods that lm-eval asks of a model.

    Contexts are given room in steps of a quarter octave, so that texts of many lengths
    share their programs; `batch_size` of them are read together. A prompt is read
    whole, question included, before an answer is made or scored.

    max_length: what a model reads at once; longer prompts lose their beginning and
    longer texts are scored in pieces. None reads everything: the cache policy decides
    what stays. max_gen_toks: new tokens where a task names no number.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        cache: Policy = "full",
        chunk: int = 512,
        batch_size: int = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ):
        if lm.tokenizer is None:
            raise LclmError("lm-eval asks in text and this model has no tokenizer")
        for name, value in (
            ("batch_size", batch_size),
            ("max_length", max_length),
            ("max_gen_toks", max_gen_toks),
        ):
            if value is not None and value < 1:
                raise LclmError(f"{name} is {value}; give a whole number of at least 1")
        self.lm, self.cache, self.chunk = lm, policies.make(cache), chunk
        self.batch_size, self.max_length = batch_size, max_length
        self.max_gen_toks = max_gen_toks

    # What lm-eval is told as answers come: its progress bars and its cache of answers.

    def watch(self, steps: Sequence[Any], label: str) -> Iterable[Any]:
        """The steps of one kind of request, one after the other."""
        return steps

    def tell(self, kind: str, asked: tuple, answer: Any) -> None:
        """An answer that will not change any more."""

    @property
    def prefix(self) -> int:
        """The token that stands before a text without a context: BOS, else EOS."""
        codec = self.lm.tokenizer
        found = [i for i in (codec.bos_id, *codec.eos_ids) if i is not None]
        if not found:
            raise LclmError(
                "a text without a context needs a token before it, and this tokenizer "
                "has neither BOS nor EOS"
            )
        return found[0]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[Likelihood]:
        """(log p of a continuation in nats, whether greedy decoding makes it) of each.

        A context is read once, whatever the number of its continuations.
        """
        asked: dict[Tokens, dict[Tokens, list[int]]]
        asked = defaultdict(lambda: defaultdict(list))
        for i, request in enumerate(requests):
            context, wanted = self.pair(*request.args)
            asked[context][wanted].append(i)
        found: list[Likelihood] = [(0.0, True)] * len(requests)
        batches = _batches(asked, self.batch_size)
        for batch in self.watch(batches, "loglikelihood"):
            for context, wanted, answer in self._scored({c: asked[c] for c in batch}):
                for i in asked[context][wanted]:
                    found[i] = answer
                    self.tell("loglikelihood", requests[i].args, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each text in nats: a pass over all of it, or its `windows`."""
        found = []
        for request in self.watch(requests, "loglikelihood_rolling"):
            tokens = self.lm.encode(request.args[0], first=False)
            total = 0.0
            for before, scored in windows(
                tokens, first=self.prefix, longest=self.max_length
            ):
                nll = self._nll([*before, *scored])[-len(scored) :]
                total += _log_p(nll)
            self.tell("loglikelihood_rolling", request.args, total)
            found.append(total)
        return found

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """The continuation of each prompt, up to a stop string or the end of text."""
        asked: dict[Generate, dict[tuple, list[int]]]
        asked = defaultdict(lambda: defaultdict(list))
        for i, request in enumerate(requests):
            text, told = request.args
            how = Generate.read(told, default=self.max_gen_toks)
            # Equal prompts have one greedy answer, and each a drawn one of its own.
            drawn = i if how.temperature else 0
            asked[how][*self.prompt(text, how.new_tokens), drawn].append(i)
        found = [""] * len(requests)
        steps = [
            (how, batch)
            for how, prompts in asked.items()
            for batch in _batches(prompts, self.batch_size)
        ]
        for how, batch in self.watch(steps, "generate_until"):
            said = self._said([list(key[:-1]) for key in batch], how, seed=batch[0][-1])
            for key, text in zip(batch, said, strict=True):
                for i in asked[how][key]:
                    found[i] = text
                    self.tell("generate_until", requests[i].args, text)
        return found

    def pair(self, context: str, wanted: str) -> tuple[Tokens, Tokens]:
        """Tokens of a context and of what follows, cut apart where the context ends.

        lm-eval's rules: spaces at the end of a context belong to what follows; the two
        are encoded as one text; without a context the `prefix` stands for it.
        """
        if not (stem := context.rstrip()):
            tokens = self.lm.encode(context + wanted, first=False)
            at = 1 if tokens[:1] == [self.prefix] else 0
            head, tail = [self.prefix], tokens[at:]
        else:
            head = first_tokens(self.lm, stem)
            tail = first_tokens(self.lm, context + wanted)[len(head) :]
        if self.max_length is not None:
            if len(tail) > self.max_length:
                raise LclmError(
                    f"a continuation has {len(tail)} tokens and max_length is "
                    f"{self.max_length}: raise it"
                )
            head = head[-(self.max_length + 1 - len(tail)) :]
        return tuple(head), tuple(tail)

    def prompt(self, text: str, new_tokens: int) -> Tokens:
        """Tokens of a prompt, its last ones where `max_length` leaves no room for all.

        An empty text is the `prefix`.
        """
        tokens = first_tokens(self.lm, text) or [self.prefix]
        if self.max_length is not None:
            if self.max_length <= new_tokens:
                raise LclmError(
                    f"max_length is {self.max_length} and an answer may have "
                    f"{new_tokens} tokens: raise the one or lower the other"
                )
            tokens = tokens[-(self.max_length - new_tokens) :]
        return tuple(tokens)

    # Chat templates.

    @property
    def tokenizer_name(self) -> str:
        """The model's name and what its tokenizer does, for caches of requests."""
        stem = self.lm.name.replace("/", "__") or "lclm"
        return f"{stem}-{fingerprint(self.lm.tokenizer)}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template as text where one is asked for."""
        if isinstance(chat_template, str):
            raise LclmError(
                f"chat template {chat_template!r}: a model has one template here, "
                "give --apply_chat_template without a name"
            )
        return self.lm.tokenizer.specials.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a talk; its last message stays open without a new one."""
        text = self.lm.tokenizer.chat(
            chat_history, add_generation_prompt=add_generation_prompt
        )
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    # The model's part.

    def _scored(
        self, asked: dict[Tokens, Iterable[Tokens]]
    ) -> Iterator[tuple[Tokens, Tokens, Likelihood]]:
        """(context, continuation, answer): the k-th continuation of every context at
        once, one after the other behind contexts that are read together.
        """
        if self.cache.recompute:
            yield from self._recomputed(asked)
            return
        contexts, choices = list(asked), [list(some) for some in asked.values()]
        longest = max(map(len, contexts))
        behind = max(len(c) for some in choices for c in some)
        context = self.lm.prefill(
            [list(c) for c in contexts],
            cache=self.cache,
            chunk=self.chunk,
            room=roomy(longest + behind) - longest,
        )
        rounds = max(map(len, choices))
        for k, texts in enumerate(itertools.zip_longest(*choices, fillvalue=())):
            if not any(texts):
                continue
            scores = context.score(texts, keep=k == rounds - 1)
            for key, text, (nll, greedy) in zip(contexts, texts, scores, strict=True):
                if text:
                    yield key, text, (_log_p(nll), bool(greedy.all()))

    def _recomputed(
        self, asked: dict[Tokens, Iterable[Tokens]]
    ) -> Iterator[tuple[Tokens, Tokens, Likelihood]]:
        """The same without a cache: every continuation reads its context anew."""
        for context, choices in asked.items():
            for wanted in filter(None, choices):
                nll = self._nll([*context, *wanted])[-len(wanted) :]
                made = self.lm.generate([list(context)], len(wanted), self.cache)[0]
                yield context, wanted, (_log_p(nll), tuple(made.tokens) == wanted)

    def _nll(self, tokens: list[int]) -> np.ndarray:
        """float32 [T-1]: losses of a text under the policy."""
        read = len(tokens) - 1
        room = roomy(read) - read
        return self.lm.nll([tokens], self.cache, self.chunk, room=room)[0]

    def _said(self, prompts: list[list[int]], how: Generate, *, seed: int) -> list[str]:
        """The continuations of a batch of prompts."""
        longest = max(map(len, prompts))
        made = self.lm.generate(
            prompts,
            how.new_tokens,
            self.cache,
            temperature=how.temperature,
            **dict(how.drawn),
            stop=how.stop,
            seed=seed,
            chunk=self.chunk,
            room=roomy(longest + how.new_tokens) - longest,
        )
        return [each.text for each in made]


def _log_p(nll: np.ndarray) -> float:
    """log p of tokens with these losses."""
    return -float(nll.sum(dtype=np.float64))


def _batches(keys: Iterable[tuple], size: int) -> list[tuple[tuple, ...]]:
    """Keys, long ones first, `size` at a time."""
    return list(itertools.batched(sorted(keys, key=len, reverse=True), size))
