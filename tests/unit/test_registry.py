"""Laws of lazy tables and of the one error type."""

import subprocess
import sys

import pytest

from lclm.errors import LclmError, did_you_mean, unknown
from lclm.registry import Entry, Table

TABLE = Table(
    "number",
    {
        "pi": Entry("math:pi", "a ratio"),
        "gone": Entry("no_such_module:thing", "never imported unless asked for"),
    },
)


def test_a_name_resolves_to_its_target():
    import math

    assert TABLE["pi"] is math.pi


def test_listing_imports_nothing():
    assert list(TABLE) == ["pi", "gone"] and len(TABLE) == 2
    assert TABLE.about()["gone"] == "never imported unless asked for"
    with pytest.raises(ModuleNotFoundError):
        TABLE["gone"]


def test_an_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(LclmError, match="known are gone, pi; did you mean 'pi'"):
        TABLE["pie"]


def test_the_error_is_a_value_error():
    assert issubclass(LclmError, ValueError)
    assert str(unknown("pet", "ct", ["cat"])).endswith("did you mean 'cat'?")
    assert did_you_mean("zzz", ["cat"]) == ""


def test_the_error_and_the_tables_need_no_jax():
    code = "import sys, lclm.errors, lclm.registry, lclm.config; "
    code += "sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
