"""Instructions made out of books: a passage, a question about it, its exact answer."""

import random
import re
from collections.abc import Iterator

from lclm.data.documents import Document, read_documents
from lclm.errors import LclmError

FINISH = "Finish this sentence of the passage as it stands there: {start}"
NEXT = "Which sentence of the passage comes right after this one? {start}"
ASKED = "Read this passage.\n\n{passage}\n\n{question}"
WORDS = (8, 40)  # a sentence that is asked about has that many words
_SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"'\u201d\u2019)]*\s*")


def book_questions(
    book: str = "kjv_books", passage: str = "2000", every: str = "1", seed: str = "0"
) -> Iterator[Document]:
    """Conversations about the passages of a book: finish a sentence, find the next one.

    passage: its characters, about. every: one passage of so many is asked about.
    The answers stand in the passage, word for word.
    """
    try:
        size, step, start = int(passage), int(every), int(seed)
    except ValueError as error:
        raise LclmError(f"book_questions: {error}; use whole numbers") from error
    if size < 200 or step < 1:
        raise LclmError(
            f"book_questions: passage={size}, every={step}; at least 200 and 1"
        )
    for document in read_documents(book):
        if not isinstance(document.text, str):
            continue
        for number, text in enumerate(passages(document.text, size)):
            rng = random.Random(f"{start}:{document.id}:{number}")
            asked = None if number % step else question(text, rng)
            if asked:
                told = ASKED.format(passage=text.strip(), question=asked[0])
                messages = [
                    {"role": "user", "content": told},
                    {"role": "assistant", "content": asked[1]},
                ]
                yield Document(f"{document.id}:{number}", messages)


def passages(text: str, size: int) -> Iterator[str]:
    """Runs of whole sentences of at least `size` characters, without a short rest."""
    found = ""
    for match in _SENTENCE.finditer(text):
        found += match[0]
        if len(found) >= size:
            yield found
            found = ""


def question(passage: str, rng: random.Random) -> tuple[str, str] | None:
    """A question about a passage and its answer, None where no sentence will do."""
    sentences = [" ".join(m[0].split()) for m in _SENTENCE.finditer(passage)]
    low, high = WORDS
    fits = [
        i
        for i, sentence in enumerate(sentences)
        if low <= len(sentence.split()) <= high and sentences.count(sentence) == 1
    ]
    if not fits:
        return None
    at = rng.choice(fits)
    if at + 1 in fits and rng.random() < 0.5:
        return NEXT.format(start=sentences[at]), sentences[at + 1]
    words = sentences[at].split()
    cut = len(words) // 2
    return FINISH.format(start=" ".join(words[:cut])), " ".join(words[cut:])
