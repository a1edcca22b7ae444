"""The folder of a training run: whose it is, and whether it may be used."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from lclm.errors import LclmError

# What may change between two sittings: how a run is looked at and where it runs.
FREE = frozenset(
    ("title", "about", "log_every", "profile", "checkpoints", "mesh", "remat", "sample")
)


def check_folder(folder: Path) -> Path:
    """`folder`, or an error where no results can be written in it."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise LclmError(f"workdir {str(folder)!r}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise LclmError(
            f"workdir {str(folder)!r}: {there} is not writable; name another --workdir"
        )
    return folder


def check_same(folder: Path, run: Any) -> None:
    """Refuse a folder that another run's results are in; name what differs."""
    if not (folder / "train.json").is_file():
        if folder.exists() and any(folder.iterdir()):
            raise LclmError(
                f"{folder} holds files and no train.json, so it is no run of this "
                "command: name another --workdir, or --restart to rename it"
            )
        return
    try:
        there = json.loads((folder / "train.json").read_text())
    except ValueError as error:
        raise LclmError(
            f"{folder / 'train.json'} is damaged ({error}): --restart begins anew and "
            "keeps the folder under another name"
        ) from error
    old, new = _flat(there), _flat(run.to_json())
    differ = [
        f"{key} is {old.get(key)!r} there and {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.split(".")[0] not in FREE
    ]
    if differ:
        raise LclmError(
            f"{folder} holds a run of another config: {'; '.join(differ)}. Use that "
            "config, name another --workdir, or --restart to begin anew (the folder "
            "is renamed)"
        )


def set_aside(folder: Path, console: Console) -> None:
    """Rename a folder to NAME.old-1, NAME.old-2, ..."""
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    console.print(f"[dim]what was in {folder} is in {aside}[/dim]")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested tables by dotted path; None and empty tables are nothing."""
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= _flat(item, f"{prefix}.{key}" if prefix else key)
        return found
    return {prefix: value}
