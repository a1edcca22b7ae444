"""Documents into token arrays with the marks of what is to be predicted."""

import hashlib
import json
import re
from typing import Any

import numpy as np

from lclm.data.documents import Document, Messages
from lclm.errors import LclmError

SLICE = 1 << 20
_LINE = re.compile(r"\S\n(?=\S)")


def fingerprint(tokenizer: Any) -> str:
    """A short name for how a tokenizer turns text and conversations into ids."""
    core = getattr(tokenizer, "core", None)
    told = [
        core.to_str() if core is not None else type(tokenizer).__name__,
        repr(getattr(tokenizer, "specials", None)),
        str(getattr(tokenizer, "add_bos", False)),
    ]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:12]


def text_hash(text: str | Messages) -> int:
    """64 bits of the SHA-256 of a document's text."""
    raw = text if isinstance(text, str) else json.dumps(text, sort_keys=True)
    return int.from_bytes(hashlib.sha256(raw.encode()).digest()[:8], "big")


def tokenise(
    document: Document, tokenizer: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids of a document, between BOS (where the model wants one) and EOS, and its mask.

    The mask is None where every token may be predicted. A conversation is written with
    the tokenizer's chat template, and only what the assistant says is predicted.
    """
    if isinstance(document.text, str):
        return np.asarray(_ends(tokenizer, encode(tokenizer, document.text))), None
    spans = _spans(document, tokenizer)
    ids: list[int] = []
    mask: list[int] = []
    for text, predicted in spans:
        some = tokenizer.encode(text)
        ids += some
        mask += [int(predicted)] * len(some)
    if document.text[0].get("raw"):
        ids = _ends(tokenizer, ids)
        front = bool(getattr(tokenizer, "add_bos", False))
        mask = [0] * front + mask + [1] * (len(ids) - len(mask) - front)
    return np.asarray(ids), np.asarray(mask, np.uint8)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a long text, a million characters at a time.

    It is cut after a line's end between two words, where byte-level BPE splits anyway,
    so that the ids are those of the whole.
    """
    ids: list[int] = []
    at = 0
    while len(text) - at > SLICE:
        found = _LINE.search(text, at + SLICE)
        if found is None:
            break
        ids += tokenizer.encode(text[at : found.end()])
        at = found.end()
    return ids + list(tokenizer.encode(text[at:]))


def _ends(tokenizer: Any, ids: list[int]) -> list[int]:
    bos = [tokenizer.bos_id] if getattr(tokenizer, "add_bos", False) else []
    return bos + ids + list(getattr(tokenizer, "eos_ids", ())[:1])


def _spans(document: Document, tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, to be predicted) of a conversation, cut around what the assistant says."""
    messages = document.text
    if messages[0].get("raw"):
        return [(m["content"], m["role"] == "assistant") for m in messages]
    spans: list[tuple[str, bool]] = []
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for text, predicted in (
            (tokenizer.chat(messages[:i], add_generation_prompt=True), False),
            (tokenizer.chat(messages[: i + 1], add_generation_prompt=False), True),
        ):
            if not text.startswith(written):
                raise LclmError(
                    f"document {document.id!r}: the chat template rewrites earlier "
                    "messages, so that answers cannot be told apart; use raw=yes with "
                    "prompts written out"
                )
            spans.append((text[len(written) :], predicted))
            written = text
    return spans
