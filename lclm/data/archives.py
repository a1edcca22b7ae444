"""Files inside folders, wheels, zips, tarballs and Debian packages, sorted by path."""

import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from lclm.data.books import ar_members
from lclm.errors import LclmError

SKIPPED = {".git", ".hg", ".svn", "__pycache__", "node_modules"}


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(path inside, content) of every file, in the order of their paths.

    Links and version control are left out; nothing is unpacked onto the disk.

    Raises:
      LclmError: no such place, or a damaged or unknown archive.
    """
    if path.is_dir():
        yield from _folder(path)
        return
    if not path.is_file():
        raise LclmError(f"no folder or archive at {str(path)!r}: correct the path")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in sorted(archive.infolist(), key=lambda i: i.filename):
                    if not info.is_dir():
                        yield info.filename, archive.read(info)
        elif path.read_bytes()[:8] == b"!<arch>\n":
            for name, data in ar_members(path.read_bytes()):
                if name.startswith("data.tar"):
                    yield from _tar(io.BytesIO(data))
        else:
            yield from _tar(io.BytesIO(path.read_bytes()))
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        lzma.LZMAError,
        gzip.BadGzipFile,
        zlib.error,
        EOFError,
    ) as error:
        raise LclmError(
            f"{path} cannot be unpacked ({error}): give a folder, .whl, .zip, .tar.* "
            "or .deb, or fetch it again"
        ) from error


def _folder(root: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(root.rglob("*"), key=lambda f: f.relative_to(root).as_posix()):
        inside = file.relative_to(root)
        if (
            SKIPPED.isdisjoint(inside.parts)
            and file.is_file()
            and not file.is_symlink()
        ):
            yield inside.as_posix(), file.read_bytes()


def _tar(file: io.BytesIO) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=file) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.isfile():
                yield member.name.removeprefix("./"), archive.extractfile(member).read()
