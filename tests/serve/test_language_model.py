"""The public object: reading, asking, streaming, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclm.cache import make
from lclm.errors import LclmError
from lclm.language_model import LanguageModel
from lclm.models.decoder import unembed
from lclm.serve import calls, memory
from lclm.serve.session import Session, pieces, roomy
from tests.tiny import tiny_lm, tokens


class Letters:
    """A tokenizer of one letter per token, for stop strings and streaming."""

    add_bos = False

    class Stream:
        def push(self, token):
            return chr(33 + token)

        def flush(self):
            return ""

    def stream(self, **_):
        return self.Stream()

    def encode(self, text, *, bos=False):
        return [ord(c) - 33 for c in text]

    def decode(self, ids):
        return "".join(chr(33 + i) for i in ids)


@pytest.fixture(scope="module")
def lm():
    plain = tiny_lm()
    return LanguageModel(plain.config, plain.params, Letters())


def greedy(lm, row, count):
    row = list(row)
    for _ in range(count):
        row.append(int(jnp.argmax(lm.logits([row])[0, -1])))
    return row[-count:]


def test_generation_equals_repeated_dense_passes(lm):
    text = tokens(1, 20)[0].tolist()
    assert lm.generate(text, 7, chunk=16).tokens == greedy(lm, text, 7)


def test_generation_stops_before_the_end_token(lm):
    text = tokens(1, 20)[0].tolist()
    free = lm.generate(text, 7, chunk=16).tokens
    eos = free[3]
    ended = tiny_lm(eos=(eos,)).generate(text, 7, chunk=16)
    assert ended.tokens == free[: free.index(eos)]


def test_streamed_pieces_add_up_to_the_text(lm):
    text = tokens(1, 20)[0].tolist()
    whole = lm.generate(text, 40, chunk=16)
    stream = lm.generate(text, 40, chunk=16, stream=True)
    assert "".join(stream) == whole.text == stream.result.text
    assert stream.result.stats.new_tokens == 40


def test_a_stop_string_is_cut_and_never_streamed(lm):
    text = tokens(1, 20)[0].tolist()
    whole = lm.generate(text, 40, chunk=16).text
    stop = whole[20:22]
    want = whole[: whole.index(stop)]
    assert lm.generate(text, 40, chunk=16, stop=[stop]).text == want
    assert "".join(lm.generate(text, 40, chunk=16, stop=stop, stream=True)) == want


@pytest.mark.slow
def test_sampling_depends_on_the_seed_alone(lm):
    text = tokens(1, 20)[0].tolist()

    def draw(seed, rows=1):
        out = lm.generate([text] * rows, 8, chunk=16, temperature=1.0, seed=seed)
        return [g.tokens for g in out]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    first, second = draw(1, rows=2)
    assert first == draw(1)[0]
    assert first != second


def test_a_context_answers_many_questions_and_stays_unchanged(lm):
    text = tokens(1, 30)[0].tolist()
    context = lm.prefill(text[:20], chunk=8)
    once = context.generate(text[20:], 5).tokens
    assert once == greedy(lm, text, 5)
    context.generate(text[:3], 5)
    assert context.generate(text[20:], 5).tokens == once


def test_room_grows_by_at_most_an_eighth_in_few_sizes(lm):
    lengths = range(2, 5000)
    assert all(n <= roomy(n) <= max(n + 15, 9 * n / 8) for n in lengths)
    assert len({roomy(n) for n in lengths}) <= 8 * 13
    held = Session(lm._engine, make("full"), rows=1, length=1, chunk=1)
    slots = set()
    for length in range(2, 60):
        held.reserve(length)
        assert held.length >= length
        slots.add(held.caches[0].groups[0].k.shape[2])
    assert slots == {16, 32, 48, 64}
    capped = Session(lm._engine, make("full:limit=20"), rows=1, length=1, chunk=1)
    capped.reserve(18)
    assert capped.length == 20


@pytest.mark.slow
def test_reading_token_by_token_compiles_one_program_for_each_size_of_room(lm):
    text = tokens(1, 50)[0].tolist()
    held = lm.prefill(text[:1], chunk=1).session
    programs = calls.read_last._cache_size()
    for token in text[1:]:
        held.read([[token]])
    assert calls.read_last._cache_size() <= programs + 4
    logits = unembed(lm.config, lm.params, held.last)
    np.testing.assert_allclose(logits[0], lm.logits([text])[0, -1], atol=1e-4)


def test_room_is_allocated_at_once_and_changes_no_token(lm):
    text = tokens(1, 30)[0].tolist()
    context = lm.prefill(text[:20], chunk=8, room=15)
    assert context.session.length == 35
    assert context.generate(text[20:], 5).tokens == greedy(lm, text, 5)
    assert lm.generate(text, 5, chunk=8, room=5).tokens == greedy(lm, text, 5)


@pytest.mark.slow
def test_a_saved_context_answers_as_the_live_one(lm, tmp_path):
    text = tokens(1, 30)[0].tolist()
    for policy in ("full", "streaming:sinks=2,window=6"):
        context = lm.prefill(text, cache=policy, chunk=8)
        context.save(tmp_path / "c")
        again = lm.load_context(tmp_path / "c")
        assert again.generate([1, 2], 5).tokens == context.generate([1, 2], 5).tokens
        assert again.stats == context.stats


def test_another_models_context_is_refused(lm, tmp_path):
    lm.prefill([1, 2, 3], chunk=8).save(tmp_path / "c")
    with pytest.raises(LclmError, match="another model"):
        tiny_lm(windows=(9, 9)).load_context(tmp_path / "c")
    (tmp_path / "d").write_bytes(b"nonsense")
    with pytest.raises(LclmError, match="not a context"):
        lm.load_context(tmp_path / "d")


def test_streaming_statistics_count_the_bounded_cache(lm):
    text = tokens(1, 40)[0].tolist()
    stats = lm.generate(text, 4, cache="streaming:sinks=2,window=6", chunk=8).stats
    per_token = 2 * 2 * 2 * 8 * 4 + 2 * 4  # k and v, 2 layers, 2 heads of 8, positions
    assert (stats.bytes, stats.kept) == (8 * per_token, 8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda lm: lm.generate([]), "no prompts"),
        (lambda lm: lm.generate(""), "empty"),
        (lambda lm: lm.generate([[1], []]), "prompt 1 is empty"),
        (lambda lm: lm.generate([97]), "outside the vocabulary"),
        (lambda lm: lm.nll([[1, 2, 3]], chunk=0), "chunk is 0"),
        (lambda lm: lm.nll([[1]]), "nothing to predict"),
        (lambda lm: lm.nll([[1.5, 2.0]]), "integers"),
        (lambda lm: lm.generate([1] * 20, 4, cache="full:limit=16"), "limit=16"),
        (lambda lm: lm.generate([1], temperature=-1.0), "temperature"),
        (lambda lm: lm.generate([1], -1), "max_new_tokens is -1"),
        (lambda lm: lm.generate([1], stop=[""]), "stop string is empty"),
        (lambda lm: lm.save("/nowhere", format="pickle"), "format 'pickle'"),
        (lambda lm: lm.load_context("/nowhere/x"), "no context file"),
    ],
)
def test_bad_input_is_one_clear_error(lm, call, says):
    with pytest.raises(LclmError, match=says):
        call(lm)


def test_text_needs_a_tokenizer():
    with pytest.raises(LclmError, match="no tokenizer"):
        tiny_lm().generate("text")
    with pytest.raises(LclmError, match="stop strings need"):
        tiny_lm().generate([1, 2], stop=["x"])


def test_a_context_that_cannot_fit_is_refused_before_it_is_allocated(lm, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    with pytest.raises(LclmError, match=r"needs .* only 1.0 MiB"):
        lm.generate([1, 2, 3], 100_000)
    lm.generate([1, 2, 3], 4, cache="streaming:sinks=2,window=6")


def test_pieces_cover_the_text_with_few_shapes():
    for length in range(1, 1200, 37):
        sizes = pieces(length, 512)
        assert length <= sum(sizes) < length + 512
        assert set(sizes) <= {16, 64, 256, 512}


@pytest.mark.slow
def test_training_layout_gives_the_same_hidden_states():
    from lclm.models.decoder import Decoder, stack_params, unstack_params
    from lclm.models.remat import RematSpec

    lm = tiny_lm(windows=(None, 9, None, 9))
    text = jnp.asarray(tokens(2, 20), jnp.int32)
    stacked = stack_params(lm.config, lm.params)
    want, _ = Decoder(lm.config).apply({"params": lm.params}, text)
    again = Decoder(lm.config, scan=True, remat=RematSpec("full"))
    got, _ = again.apply({"params": stacked}, text)
    np.testing.assert_allclose(got, want, atol=2e-5)
    back = unstack_params(lm.config, stacked)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), lm.params, back))


@pytest.mark.slow
def test_packed_documents_equal_documents_alone():
    lm = tiny_lm()
    from lclm.models.decoder import Decoder

    text = jnp.asarray(tokens(1, 20), jnp.int32)
    positions = jnp.concatenate([jnp.arange(12), jnp.arange(8)])[None]
    segments = jnp.repeat(jnp.array([1, 2]), jnp.array([12, 8]))[None]
    packed, _ = Decoder(lm.config).apply(
        {"params": lm.params}, text, positions, segments
    )
    alone, _ = Decoder(lm.config).apply({"params": lm.params}, text[:, 12:])
    np.testing.assert_allclose(packed[:, 12:], alone, atol=2e-5)
