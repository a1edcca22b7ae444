"""Checkpoints of a run: written beside the steps, read back onto any mesh."""

import json
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lclm.data.fetch import write_atomic
from lclm.errors import LclmError
from lclm.processes import first, told
from lclm.train.config import Checkpoints
from lclm.train.state import TrainState
from lclm.tree import flatten
from lclm.typing import Params

FILES = "files.json"
UNFINISHED = re.compile(r"orbax-checkpoint-tmp|^removed-")

Warn = Callable[[str], None]


class Store:
    """The checkpoints of one run, in `folder`/<step>, newest last.

    A checkpoint is an Orbax tree of the training state with `about` (the run, its base)
    and the place in the batches as its metadata. It appears under its name only when it
    is whole; the sizes and checksums of its files then follow in files.json. Frozen
    parameters are not in it: they come from the run's source again.
    """

    def __init__(
        self, folder: Path, spec: Checkpoints, *, about: dict[str, Any], warn: Warn
    ):
        self.folder, self.spec = Path(folder).absolute(), spec
        self._about, self._warn = about, warn
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[int, Future] | None = None

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return steps_in(self.folder)

    def due(self, step: int) -> bool:
        """Whether the run's settings want a checkpoint after this step."""
        return bool(self.spec.every) and step % self.spec.every == 0

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Copy the state off the devices and write it in the background.

        data: the place of the batches after this step. A write that fails (a full disk)
        is told to `warn` and loses nothing but this checkpoint.
        """
        self.wait()
        self._sweep()
        step = int(state.step)
        place = self.folder / str(step)
        if place.exists():
            return
        about = self._about | {"step": step, "data": data}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            answer = ocp.save_async(place, named(state), custom_metadata=about)
        except Exception as error:
            self._failed(step, error)
            return
        self._writing = step, self._thread.submit(self._complete, place, answer)

    def wait(self) -> None:
        """Return when no checkpoint is being written."""
        if self._writing is None:
            return
        (step, writing), self._writing = self._writing, None
        try:
            writing.result()
        except Exception as error:
            self._failed(step, error)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest undamaged state, laid out as `like`, and what was saved with it.

        A damaged checkpoint is renamed, told to `warn`, and the one before is taken;
        None where none is left.

        Raises:
          LclmError: the checkpoint is of another shape, or stands on another base.
        """
        self._sweep()
        step = told(self._newest() if first() else 0)
        if step < 0:
            return None
        place = self.folder / str(step)
        about = read_about(place)
        check_base(place, about, self._about)
        return read_state(place, like), about

    def _newest(self) -> int:
        """The step of the newest checkpoint that is whole, -1 for none."""
        for step in reversed(self.steps()):
            place = self.folder / str(step)
            try:
                verify(place)
                read_about(place)
            except Damaged as error:
                self._set_aside(place, str(error))
                continue
            return step
        return -1

    def _complete(self, place: Path, answer: Any) -> None:
        answer.result()
        if first():
            write_atomic(place / FILES, json.dumps(checksums(place)) + "\n")
            self._prune()

    def _prune(self) -> None:
        every = self.spec.keep_every
        for step in self.steps()[: -self.spec.keep]:
            if not every or step % every:
                gone = self.folder / f"removed-{step}"
                (self.folder / str(step)).rename(gone)
                shutil.rmtree(gone)

    def _sweep(self) -> None:
        """Remove what a killed process left half written or half removed."""
        if first() and self.folder.is_dir():
            for path in self.folder.iterdir():
                if UNFINISHED.search(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def _failed(self, step: int, error: Exception) -> None:
        for path in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        kept = self.steps()
        newest = f"step {kept[-1]}" if kept else "none yet"
        self._warn(
            f"the checkpoint of step {step} could not be written ({short(error)}); the "
            f"run goes on, its newest checkpoint is {newest}: free some space in "
            f"{self.folder}"
        )

    def _set_aside(self, place: Path, why: str) -> None:
        aside = place.with_name(f"damaged-{place.name}")
        if aside.exists():
            shutil.rmtree(aside)
        place.rename(aside)
        self._warn(f"{place} is damaged ({why}): kept as {aside.name}, not used")


class Damaged(Exception):
    """A checkpoint whose files are not what was written."""


def steps_in(folder: Path) -> list[int]:
    """Steps with a finished checkpoint in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def check_base(place: Path, about: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse a checkpoint whose frozen parameters were others than ours."""
    there, here = about.get("base") or {}, ours.get("base") or {}
    if there.get("sum") != here.get("sum"):
        raise LclmError(
            f"{place} was trained on the base {there.get('source')!r} (checksum "
            f"{there.get('sum')}), this run's base {here.get('source')!r} has "
            f"{here.get('sum')}: frozen parameters differ; give the same base, or "
            "another --workdir"
        )


def named(state: Any) -> dict[str, Any]:
    """The leaves of a state by a name that says where they stand."""
    found = jax.tree_util.tree_flatten_with_path(state)[0]
    return {".".join(map(_word, path)): leaf for path, leaf in found}


def _word(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field)).replace("/", ".")
    raise TypeError(f"a state has no leaves under {key!r}")


def read_about(place: Path) -> dict[str, Any]:
    """What was saved beside the arrays."""
    try:
        about = ocp.metadata(place).custom_metadata
    except Exception as error:
        raise Damaged(short(error)) from error
    if not isinstance(about, dict) or "data" not in about:
        raise Damaged("it does not say where in the data it stands")
    return about


def read_state(place: Path, like: TrainState) -> TrainState:
    """The arrays of a checkpoint with the types and the layout of `like`."""
    wanted = named(like)
    check_shapes(place, ocp.metadata(place).metadata, wanted)
    found = ocp.load(place, {name: abstract(leaf) for name, leaf in wanted.items()})
    return jax.tree.unflatten(jax.tree.structure(like), [found[n] for n in wanted])


def abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, type and layout of an array."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def check_shapes(place: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model, adapter or optimizer; name differences."""
    there = {n: tuple(m.shape) for n, m in found.items()}
    here = {n: tuple(leaf.shape) for n, leaf in wanted.items()}
    differ = [
        f"{name} is {there.get(name, 'not there')}, expected {here.get(name, 'none')}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differ:
        more = f", and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise LclmError(
            f"{place} is a checkpoint of another shape: {'; '.join(differ[:5])}{more}. "
            "Use the config that made it, or another workdir"
        )


def checksums(place: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file of a checkpoint."""
    found = {}
    for path in sorted(p for p in place.rglob("*") if p.is_file()):
        name = path.relative_to(place).as_posix()
        if name != FILES:
            found[name] = _checksum(path)
    return found


def _checksum(path: Path) -> list[int]:
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def verify(place: Path) -> None:
    """Raise `Damaged` where a file is missing, cut short or changed.

    A checkpoint whose process was killed between its own end and its files.json is
    read once to find out.
    """
    if not (place / FILES).is_file():
        try:
            ocp.load(place)
        except Exception as error:
            raise Damaged(short(error)) from error
        return
    try:
        told = json.loads((place / FILES).read_text())
        for name, want in told.items():
            if _checksum(place / name) != want:
                raise Damaged(f"{name} is not what was written")
    except (OSError, ValueError, AttributeError) as error:
        raise Damaged(short(error)) from error


def short(error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def fingerprint(params: Params) -> str:
    """A short checksum of a few parameters, enough to tell two models apart."""
    flat = flatten(params)
    names = sorted(flat)
    chosen = sorted({names[i * (len(names) - 1) // 3] for i in range(4)})
    crc = 0
    for name in chosen:
        for leaf in jax.tree.leaves(flat[name]):
            head = np.asarray(leaf.reshape(-1)[:4096])
            text = f"{name} {leaf.shape} {head.dtype}".encode()
            crc = zlib.crc32(head.tobytes(), zlib.crc32(text, crc))
    return f"{crc:08x}"


def state_bytes(state: TrainState) -> int:
    """Bytes of one checkpoint."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def check_disk(folder: Path, *, need: int) -> None:
    """Raise `LclmError` where a file system has less than `need` bytes free."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise LclmError(
            f"{folder} has {free / 1e9:.2f} GB free, and this run's checkpoints and "
            f"model take {need / 1e9:.2f} GB: free some, lower checkpoints.keep, or "
            "name another --workdir"
        )
