"""Laws of the made-up retrieval tasks."""

import json
import re

import numpy as np
import pytest

from lclm.data.batch import make_batch
from lclm.data.documents import check, read_documents
from lclm.data.pipeline import DataSpec, open_batches
from lclm.errors import LclmError
from lclm.hub.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
SENTENCE = "It was a dark and stormy night, number {}. "


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(SENTENCE.format(i) for i in range(400)))
    return f"passkeys:book=local:path={path}"


def batches(source, *, length=2048, seed=0, batch=2, **options):
    spec = DataSpec(source=source, **options)
    return open_batches(spec, BYTES, batch=batch, length=length, seed=seed)


def test_every_key_is_stated_once_and_only_the_answers_are_predicted(book):
    batch = next(batches(book + ",keys=4,words=6"))
    assert batch["tokens"].shape == (2, 2048)
    for tokens, targets, weights in zip(
        batch["tokens"], batch["targets"], batch["weights"], strict=True
    ):
        text = BYTES.decode(tokens) + BYTES.decode(targets[-1:])
        facts = dict(re.findall(r"the (\w+) passkey is((?: \w+){6})\.", text))
        asked = re.findall(r"The (\w+) passkey is((?: \w+){6})", text)
        assert len(facts) == 4 and dict(asked) == facts
        predicted = BYTES.decode(targets[weights > 0])
        assert predicted == "".join(answer for _, answer in asked)
        assert SENTENCE[:20] in text


def test_keys_lie_at_even_depths_before_a_sentence(book):
    batch = next(batches(book + ",keys=4,words=2,low=0.1,high=0.9", length=6000))
    text = BYTES.decode(batch["tokens"][0])
    places = [m.start() / len(text) for m in re.finditer("\nRemember this", text)]
    np.testing.assert_allclose(places, np.linspace(0.1, 0.9, 4), atol=0.05)
    assert all(text[m.start() - 2] == "." for m in re.finditer(" \nRemember", text))


def test_short_rows_hold_fewer_keys_and_too_short_ones_none(book):
    batch = next(batches(book + ",keys=10,words=8", length=1000))
    text = BYTES.decode(batch["tokens"][0])
    assert 1 <= text.count("Remember this") < 10
    with pytest.raises(LclmError, match="longer rows"):
        batches(book + ",keys=10,words=8", length=200)
    with pytest.raises(LclmError, match="longer book"):
        batches(book + ",keys=1", length=10**5)


def test_rows_differ_and_a_stream_goes_on_from_its_state(book):
    source = book + ",keys=2,words=3"
    lengths = (512, 1024)
    stream = batches(source, lengths=lengths)
    want = [next(stream) for _ in range(6)]
    assert not np.array_equal(want[0]["tokens"][0], want[0]["tokens"][1])
    again = batches(source, lengths=lengths)
    next(again)
    state = json.loads(json.dumps(again.get_state()))
    other = batches(source, lengths=lengths)
    other.set_state(state)
    for batch in want[1:]:
        np.testing.assert_array_equal(next(other)["tokens"], batch["tokens"])
    assert {b["tokens"].shape[1] for b in want} == set(lengths)


def test_digits_and_the_whole_text_can_be_asked_for(book):
    stream = batches(book + ",keys=1,words=5,kind=digits,predict=all")
    batch = next(stream)
    assert (batch["weights"] == 1).all()
    assert re.search(r"passkey is \d{5}\.", BYTES.decode(batch["tokens"][0]))


def test_a_task_is_a_batch_of_whole_documents(book):
    batch = next(batches(book + ",keys=1,words=2", length=512))
    assert (batch["segments"] == 1).all()
    rows = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], 1)
    np.testing.assert_array_equal(make_batch(rows)["targets"], batch["targets"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("keys=0", "1 to 16"),
        ("keys=x", "whole numbers"),
        ("low=0.9,high=0.1", "low <= high"),
        ("kind=letters", "digits"),
        ("predict=none", "answers"),
        ("depth=1", "not an option"),
    ],
)
def test_settings_are_checked_before_the_book_is_read(options, said):
    with pytest.raises(LclmError, match=said):
        check("passkeys:book=kjv," + options)


def test_a_stream_is_no_text(book):
    with pytest.raises(LclmError, match="makes rows"):
        next(read_documents(book))
    with pytest.raises(LclmError, match="unknown source 'kjw'"):
        check("passkeys:book=kjw")
