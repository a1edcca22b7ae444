"""Budgets in bytes become the most tokens that fit, or one clear error."""

import jax.numpy as jnp
import pytest

from lclm import cache as policies
from lclm.cache.sized import amount
from lclm.errors import LclmError
from lclm.serve import snapshot
from lclm.serve.result import Stats
from lclm.serve.session import Engine, Session
from tests.tiny import tiny_config


def fitted(policy, dtype=jnp.float32, length=40, **config):
    return policies.make(policy).fitted(tiny_config(**config), dtype, length)


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("64MiB", 64 << 20),
        ("1.5 GiB", 3 << 29),
        ("2KiB", 2048),
        ("3kB", 3000),
        ("7MB", 7_000_000),
        ("12B", 12),
        ("64", None),
        ("64Mb", None),
        ("64iB", None),
        (64, None),
    ],
)
def test_amounts_are_those_of_their_units(text, bytes):
    assert amount(text) == bytes


def test_half_the_bytes_a_number_is_twice_the_tokens():
    wide, narrow = (
        fitted("streaming:window=100KiB", dtype).window
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    token = 2 * 2 * 2 * 8  # numbers of a token's keys and values, and positions
    assert wide + 4 == (100 << 10) // (4 * token + 8)
    assert narrow + 4 == (100 << 10) // (2 * token + 8)


def test_layers_that_see_less_leave_their_bytes_to_the_others():
    policy = fitted({"name": "h2o", "budget": "9 KiB"}, windows=(9, None))
    window = 8 * (2 * 2 * 8 * 4 + 4)
    assert policy.budget == (9 * 1024 - window) // (2 * 2 * 8 * 4 + 2 * 4 + 2 * 4)
    # Where all layers keep their own window, every budget takes those bytes.
    small, whole = (
        fitted(f"h2o:budget={n}B", windows=(17, 17)).budget for n in (4223, 4224)
    )
    assert small == 4223 // 288 and whole >= 17


def test_heads_that_keep_all_are_counted_at_the_length_of_the_text():
    duo = {"name": "duo", "sinks": 0, "window": "4KB", "gates": "random"}
    sizes = [fitted(duo, length=n).window for n in (8, 16, 20)]
    assert sizes == [8, 4000 // 132 - 16, 4000 // 132 - 20]
    with pytest.raises(LclmError, match=r"window=1, takes .* a row of 40 tokens"):
        fitted(duo, length=40)


def test_a_size_in_bytes_round_trips_through_a_saved_context(tmp_path):
    engine = Engine(tiny_config(), {}, jnp.float32, jnp.float32)
    asked = policies.make("snapkv:budget=20KB,bits=4")
    held = Session(engine, asked, rows=2, length=40, chunk=16)
    snapshot.save(tmp_path / "context", held, Stats(), False)
    again, _, _ = snapshot.load(tmp_path / "context", engine)
    assert again.policy == held.policy
    assert again.policy.budget > 100
    assert again.policy.fitted(engine.config, jnp.bfloat16, 7) == held.policy


def test_lclm_plan_takes_bytes(capsys):
    from lclm.cli.plan import main

    main(["tiny-bytes", "--cache", "h2o:budget=1MiB", "--context", "1k,64k"])
    assert "1023.2 KiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("h2o:budget=100B", "budget=100B: its smallest cache, budget=1, takes 288 b"),
        ("knorm:budget=1KiB", "budget=5, takes 1,440 bytes"),
        ("infinipot:budget=1B", "budget=2, takes"),
        ("quest:budget=1MiB", "'quest': budget=1MiB.*does not set the bytes"),
        ("recompute:window=1MiB", "give tokens"),
        ("streaming:sinks=1MiB", "not a whole number"),
        ("h2o:budget=1MiB,recnt=2", "did you mean 'recent'"),
    ],
)
def test_bytes_that_nothing_fits_into_are_one_clear_error(policy, says):
    with pytest.raises(LclmError, match=says):
        fitted(policy)
