"""Laws of running: records survive, resume skips, figures and tables follow."""

import json
import math

import numpy as np
import pytest
from eval_doubles import Scripted

from lclm.errors import LclmError
from lclm.evals.base import KEY, Journal, key_of
from lclm.evals.curves import buckets, even_edges, log_edges
from lclm.evals.key_tokens import KeyTokens
from lclm.evals.needle import Needle
from lclm.evals.passkey import Passkey
from lclm.evals.perplexity import Pace, Perplexity, Reading, score
from lclm.evals.sliding import slide

PNG = b"\x89PNG"


def record(**more):
    base = dict(task="t", length=1, depth=0.5, seed=0, cache="full")
    return {**base, **more}


def test_journal_gives_back_what_was_added(tmp_path):
    path = tmp_path / "deep" / "m.jsonl"
    Journal(path).add(record(score=1.0, nll=float("nan"), x=np.float32(2)))
    again = Journal(path)
    assert again.records == [record(score=1.0, nll=None, x=2.0, scope="")]
    found = again.find(**dict(zip(KEY, key_of(record()), strict=True)))
    assert found is again.records[0]
    assert again.find(task="t", length=2, depth=0.5, seed=0, cache="full") is None


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_journal_drops_a_torn_last_line_and_appends_after_it(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    journal = Journal(path)
    journal.add(record(seed=0))
    journal.add(record(seed=1))
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path)
    assert [r["seed"] for r in again.records] == [0]
    again.add(record(seed=2))
    assert [json.loads(x)["seed"] for x in path.read_text().splitlines()] == [0, 2]


def test_journal_drops_a_last_line_that_is_whole_but_no_record(tmp_path):
    path = tmp_path / "m.jsonl"
    Journal(path).add(record(seed=0))
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"task": "t", "seed"\n')
    assert [r["seed"] for r in Journal(path).records] == [0]
    assert path.read_bytes() == kept


def test_journal_refuses_damage_before_the_last_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"task": "a"}\nnot json\n{"task": "b"}\n')
    before = path.read_bytes()
    with pytest.raises(LclmError, match=r"line 2 is not a record.*delete that line"):
        Journal(path)
    assert path.read_bytes() == before


def test_records_of_another_scope_stay_and_are_not_taken(tmp_path):
    path = tmp_path / "m.jsonl"
    Journal(path, scope="a").add(record())
    other = Journal(path, scope="b")
    assert other.records == []
    other.add(record())
    assert len(Journal(path, scope="a").records) == 1
    assert len(path.read_text().splitlines()) == 2


class Interrupted(Scripted):
    """Ctrl-C arrives at the given call."""

    def __init__(self, tokenizer, at):
        super().__init__(tokenizer)
        self.at = at

    def tick(self):
        if len(self.calls) == self.at:
            raise KeyboardInterrupt

    def nll(self, *args, **options):
        self.tick()
        return super().nll(*args, **options)

    def generate(self, *args, **options):
        self.tick()
        return super().generate(*args, **options)


def jobs(source):
    return [
        Passkey(lengths=(300, 400), depths=(0.1, 0.9), trials=2),
        Needle(lengths=(400,), points=3, source=source, trials=2),
        Perplexity(
            (Reading("full"), Reading("window:window=8")),
            source,
            length=300,
            documents=2,
        ),
    ]


@pytest.mark.parametrize("which", range(3))
def test_an_interrupt_loses_no_finished_record_and_a_rerun_resumes(
    tokenizer, source, tmp_path, which
):
    job, path = jobs(source)[which], tmp_path / "m.jsonl"
    with pytest.raises(KeyboardInterrupt):
        job.run(Interrupted(tokenizer, at=3), journal=Journal(path))
    assert len(path.read_text().splitlines()) == 3
    second = Scripted(tokenizer)
    resumed = job.run(second, journal=Journal(path))
    plain = Scripted(tokenizer)
    straight = job.run(plain, journal=Journal(tmp_path / "other.jsonl"))
    assert len(second.calls) == len(plain.calls) - 3
    timing = ("seconds", "tokens_per_second")
    strip = [
        [{k: v for k, v in r.items() if k not in timing} for r in run]
        for run in (resumed, straight)
    ]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_that_finds_scores_one_everywhere(lm, source, tmp_path, which):
    job = jobs(source)[which]
    records = job.run(lm, journal=Journal(tmp_path / "m.jsonl"))
    assert [r["score"] for r in records] == [1.0] * len(job.cells())
    summary = job.summary(records, trained=8192)
    assert summary.panels[0].rows[0][-1] == f"{len(records)}/{len(records)}"
    assert all(f.png().startswith(PNG) for f in summary.figures.values())
    assert len(summary.figures) == 1


def test_a_model_that_sees_only_the_end_misses_early_needles(
    tokenizer, source, tmp_path
):
    job = Needle(lengths=(600,), points=5, source=source)
    lm = Scripted(tokenizer, sees=300)
    records = job.run(lm, journal=Journal(tmp_path / "m.jsonl"))
    assert [r["score"] for r in records] == [0, 0, 0, 1, 1]
    csv = job.summary(records, trained=0).csv["needle.csv"].splitlines()
    assert csv[0] == "cache,length,depth,score,n"
    assert csv[1:3] == ["full,600,0.0,0.0,1", "full,600,0.25,0.0,1"]


def test_forced_passkey_is_the_loss_of_the_key_tokens(lm, tmp_path):
    job = Passkey(lengths=(300,), depths=(0.5,), score="forced")
    found = job.run(lm, journal=Journal(tmp_path / "m.jsonl"))[0]
    example = job.examples(lm.tokenizer)[0]
    prompt = lm.tokenizer.encode(example.prompt)
    whole = lm.tokenizer.encode(f"{example.prompt} {example.answers[0]}")
    nll = lm.nll([whole])[0]
    assert found["key_tokens"] == len(whole) - len(prompt) > 0
    assert found["log_p"] == pytest.approx(-nll[len(prompt) - 1 :].sum(), rel=1e-6)
    assert found["score"] == 1


@pytest.mark.parametrize("window, stride", [(16, 15), (16, 1), (16, 4), (64, 8)])
@pytest.mark.parametrize("length", [2, 15, 16, 17, 61])
def test_sliding_scores_every_target_once_with_the_widest_view(window, stride, length):
    tokens = np.arange(length)[None]

    def nll_of(part):
        # The loss "is" the target with how much context its window gave it.
        seen = np.arange(1, part.shape[1])
        return part[:, 1:] * 1000.0 + seen

    found = slide(nll_of, tokens, window=window, stride=stride).nll[0]
    targets, seen = np.divmod(found, 1000)
    assert targets.tolist() == list(range(1, length))
    assert (seen <= window - 1).all()
    full = targets >= window
    assert (seen[full] >= window - stride).all()
    assert (seen[~full] == targets[~full]).all()


def test_yarn_perplexity_weighs_windows_not_tokens():
    tokens = np.arange(24)[None]
    found = slide(
        lambda t: np.where(t[:, 1:] < 16, 1.0, 3.0), tokens, window=16, stride=8
    )
    assert found.window_means == (1.0, 3.0)
    assert found.perplexity("yarn") == pytest.approx(math.exp(2.0))
    assert found.perplexity() == pytest.approx(math.exp((15 * 1 + 8 * 3) / 23))
    with pytest.raises(LclmError, match="'hf'; allowed are"):
        found.perplexity("hf")


def test_bits_per_byte_and_word_perplexity_by_hand():
    found = score(np.full((1, 4), math.log(2.0)), "né ab c")
    assert (found["bytes"], found["words"]) == (8, 3)
    assert found["bits_per_byte"] == pytest.approx(4 / 8)
    assert found["word_perplexity"] == pytest.approx(2 ** (4 / 3))
    assert found["perplexity"] == pytest.approx(2.0)


def test_buckets_partition_the_targets_and_keep_the_mean():
    nll = np.random.default_rng(0).normal(3, 1, (3, 999)).astype(np.float32)
    for edges in (log_edges(1000), even_edges(1000, 256)):
        parts = buckets(nll, edges)
        assert sum(b.count for b in parts) == nll.size
        mean = sum(b.nll * b.count for b in parts) / nll.size
        assert mean == pytest.approx(nll.mean(dtype=np.float64))
        assert all(b.low <= b.nll <= b.high for b in parts)
    assert log_edges(1000)[:4] == [1, 2, 4, 8]
    assert log_edges(1000)[-2:] == [512, 1000]
    only = buckets(np.arange(1.0, 8.0)[None], [4, 8])[0]
    assert (only.nll, only.count) == (5.5, 4)


def test_bootstrap_interval_covers_the_mean_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(100):
        part = buckets(rng.normal(2, 1, (1, 512)), [0, 513], seed=seed)[0]
        hits += part.low <= 2 <= part.high
    assert 86 <= hits <= 100


def test_perplexity_reads_the_same_tokens_to_each_reading_s_length(
    lm, source, tmp_path
):
    job = Perplexity(
        (
            Reading("full", label="full attention", length=200),
            Reading("streaming:sinks=4,window=60", chunk=64),
            Reading("full", window=64, stride=16),
        ),
        source,
        length=400,
        splits=(100, 300),
        bucket=50,
    )
    heard = []
    records = job.run(
        lm,
        journal=Journal(tmp_path / "m.jsonl"),
        observe=lambda label, done, total: heard.append((label, done, total)),
    )
    assert [r["length"] for r in records] == [200, 400, 400]
    assert ("full attention", 200, 200) == heard[
        heard.index(next(h for h in heard if "stream" in h[0])) - 1
    ]
    assert records[0]["segments"][0] == records[1]["segments"][0]
    assert records[0]["curve"][:3] == records[1]["curve"][:3]
    assert [s[:2] for s in records[1]["segments"]] == [[0, 100], [100, 300], [300, 400]]
    panel = job.summary(records, trained=100).panels[0]
    assert panel.columns[2:5] == (
        "ppl 0-100",
        "ppl 100-300",
        "ppl 300-400",
    )
    assert panel.rows[0][0] == "full attention"
    assert panel.rows[0][3].endswith("(to 200)") and panel.rows[0][4] == "-"
    assert panel.rows[0][6] == "195.3 KiB"
    figure = job.summary(records, trained=100).figures["loss_by_position.png"]
    assert figure.png()[:4] == PNG


class Remembers(Scripted):
    """Knows some tokens only where it sees the one `back` places before them."""

    back = 60

    def nll(self, tokens, *, cache="full", chunk=512, progress=None):
        self.calls.append(("nll", cache, tokens.shape))
        nll = np.full((1, tokens.shape[1] - 1), 4.0, np.float32)
        at = np.arange(1, tokens.shape[1])
        if cache == "full":
            nll[0, at >= self.back] = np.where(tokens[0, self.back :] % 2, 0.5, 4.0)
        return nll


def test_long_ppl_is_that_of_tokens_a_short_context_cannot_predict(
    tokenizer, source, tmp_path
):
    lm, path = Remembers(tokenizer), tmp_path / "m.jsonl"
    keys = KeyTokens(short=40, block=10)
    readings = (Reading("full"), Reading("window:window=8"))
    job = Perplexity(readings, source, length=200, keys=keys)
    records = job.run(lm, journal=Journal(path))
    pieces = job.pieces(lm)[0]
    odd = [p for p in range(60, 200) if pieces[p] % 2]
    (chosen,) = (r for r in Journal(path).records if r["task"] == "key_tokens")
    assert chosen["positions"] == odd
    assert [(r["key_nll"], r["key_tokens"]) for r in records] == [
        (0.5, len(odd)),
        (4.0, len(odd)),
    ]
    panel = job.summary(records, trained=100).panels[0]
    told = [f"{math.exp(nll):.2f} ({len(odd)})" for nll in (0.5, 4.0)]
    assert panel.columns[-1] == "LongPPL" and [r[-1] for r in panel.rows] == told
    asked = len(lm.calls)
    assert job.run(lm, journal=Journal(path)) == records and len(lm.calls) == asked
    plain = Perplexity(readings, source, length=200)
    assert "key_nll" not in plain.run(lm, journal=Journal(path))[0]
    near = Perplexity(readings, source, length=50, keys=keys)
    assert [r["key_tokens"] for r in near.run(lm, journal=Journal(path))] == [0, 0]
    with pytest.raises(LclmError, match="short is 0"):
        KeyTokens(short=0)


def test_a_start_token_is_counted_and_opens_every_document(lm, source, tmp_path):
    plain = Perplexity(source=source, length=98).pieces(lm)
    lm.start = [lm.tokenizer.bos_id]
    pieces = Perplexity(source=source, length=50, documents=2).pieces(lm)
    assert pieces.shape == (2, 50)
    assert (pieces[:, 0] == lm.tokenizer.bos_id).all()
    assert (pieces[:, 1:].ravel() == plain[0]).all()
    journal = Journal(tmp_path / "m.jsonl")
    needle = Needle(lengths=(400,), at=(0.5,), source=source)
    for job in (Passkey(lengths=(300,), score="forced"), needle):
        lm.calls.clear()
        records = job.run(lm, journal=journal)
        asked = [c[2] for c in lm.calls if c[0] == "generate"]
        assert asked == [r["prompt_tokens"] for r in records]
        assert all(r["prompt_tokens"] <= r["length"] for r in records)


def test_an_opening_stands_in_place_of_the_first_tokens(lm, source, tmp_path):
    piece = Perplexity(source=source, length=50).pieces(lm)
    reading = Reading("window:window=8", opening=(".", ".", " a"))
    opened = reading.opened(piece, lm.tokenizer.encode)
    assert lm.tokenizer.decode(opened[0, :3]) == ".. a"
    assert opened.shape == piece.shape and (opened[0, 3:] == piece[0, 3:]).all()
    job = Perplexity((Reading("window:window=8"), reading), source, length=50)
    records = job.run(lm, journal=Journal(tmp_path / "m.jsonl"))
    assert records[1]["cache"] == "window:window=8 after '.. a'"
    assert len(job.summary(records, trained=100).panels[0].rows) == 2
    encode = lm.tokenizer.encode
    with pytest.raises(LclmError, match="tokens of this model"):
        Reading(opening=("no word",)).opened(piece, encode)
    with pytest.raises(LclmError, match="an opening of 50 tokens and a text of 50"):
        Reading(opening=("a",) * 50).opened(piece, encode)


def test_a_loss_that_is_not_finite_is_refused_with_its_position(lm, source, tmp_path):
    class Broken(Scripted):
        def nll(self, tokens, **options):
            nll = super().nll(tokens, **options)
            nll[0, 9] = np.nan
            return nll

    path = tmp_path / "m.jsonl"
    with pytest.raises(LclmError, match=r"position 10 under cache 'full' is not"):
        Perplexity(source=source, length=50).run(
            Broken(lm.tokenizer), journal=Journal(path)
        )
    assert not path.exists()


def test_a_text_that_is_too_short_says_how_long_it_is(lm, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    count = len(lm.tokenizer.encode("A few words."))
    job = Perplexity(source=f"local:path={short}", length=500)
    with pytest.raises(LclmError, match=f"500 tokens wanted.* has {count}; use"):
        job.run(lm, journal=Journal(tmp_path / "m.jsonl"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Reading(window=16), "needs both"),
        (lambda: Reading(window=16, stride=16), "stride is 16; allowed is 1 to 15"),
        (lambda: Reading(chunk=0), "chunk is 0"),
        (lambda: Reading(length=1), "length is 1"),
        (lambda: Perplexity(length=1), "length is 1"),
        (lambda: Perplexity(readings=()), "readings is empty"),
        (lambda: Perplexity((Reading(), Reading())), "twice"),
        (lambda: Perplexity(splits=(8, 4)), "increasing"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(LclmError, match=words):
        make()


def test_the_rate_leaves_out_the_first_chunk(monkeypatch):
    clock = iter([0.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr("lclm.evals.perplexity.time.perf_counter", lambda: next(clock))
    pace = Pace()
    for done in (100, 200, 300):
        pace.tick(done)
    assert pace.rate() == 100.0
