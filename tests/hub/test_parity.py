"""Our logits are those of transformers, from its own files (see tests/oracles)."""

import jax
import numpy as np
import pytest
from conftest import GOLDEN, MODELS

import lclm
from lclm import hub
from lclm.hub.known import KNOWN, cache_folder

SMOLLM2 = cache_folder() / "models" / KNOWN["smollm2-135m"].file


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    with np.load(GOLDEN / name / "golden.npz") as golden:
        tokens, expected = golden["tokens"], golden["logits"]
    found = np.asarray(lclm.load(GOLDEN / name).logits(tokens))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def golden():
    if not SMOLLM2.is_file():
        pytest.skip("needs SmolLM2: run `lclm pull smollm2-135m`")
    with np.load(GOLDEN / "smollm2" / "golden.npz") as arrays:
        return dict(arrays)


@pytest.mark.real
def test_smollm2_logits_are_those_of_transformers(golden):
    lm = lclm.load("smollm2-135m")
    logits = np.asarray(lm.logits(golden["tokens"]))[0]
    for found, key in (
        (logits[:, ::768], "logits_every_768"),
        (logits[-1, ::16], "last_logits_every_16"),
    ):
        assert np.abs(found - golden[key]).max() <= 1e-4 * np.abs(golden[key]).max()
    targets = golden["tokens"][0, 1:]
    nll = -np.asarray(jax.nn.log_softmax(logits[:-1]))[np.arange(63), targets]
    assert np.abs(nll - golden["nll"]).max() <= 1e-3


@pytest.mark.real
def test_smollm2_tokens_and_chat_are_those_of_transformers(golden):
    tokenizer = hub.load("smollm2-135m", packed="int4").tokenizer
    for i, text in enumerate(golden["texts"]):
        assert tokenizer.encode(str(text)) == golden[f"ids_{i}"].tolist()
        assert tokenizer.decode(golden[f"ids_{i}"], special=True) == str(text)
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == str(golden["chat"])
    assert not tokenizer.add_bos and tokenizer.eos_ids == (2,)
