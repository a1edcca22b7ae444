"""One run after another: what a run takes over from the one it starts from."""

import re
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lclm.errors import LclmError
from lclm.train.checkpoint import (
    Damaged,
    abstract,
    check_base,
    check_shapes,
    named,
    read_about,
    steps_in,
    verify,
)
from lclm.train.state import TrainState

PARAMS = "params."
MOMENT = re.compile(r"^(opt\.\d+\.)(mu|nu)\.")


def begin_from(
    folder: Path, state: TrainState, *, about: dict[str, Any], optimizer: bool
) -> TrainState:
    """`state` with the trained parameters of the finished run in `folder`.

    With `optimizer` Adam's moments and their count come too. The count of steps and of
    the schedule stay as they are in `state`.

    Raises:
      LclmError: no finished run, other trained parameters, or another base.
    """
    place = finished(folder)
    try:
        verify(place)
        check_base(place, read_about(place), about)
    except Damaged as error:
        raise LclmError(f"start_from: {place} is damaged ({error})") from error
    ours = named(state)
    theirs = ocp.metadata(place).metadata
    wanted = {n: leaf for n, leaf in ours.items() if n.startswith(PARAMS)}
    pairs = {n: n for n in wanted}
    if optimizer:
        pairs |= _moments(ours, theirs)
    there = {n: theirs[n] for n in theirs if n.startswith(PARAMS)}
    check_shapes(place, there, wanted)
    target = {pairs[n]: abstract(ours[n]) for n in pairs}
    options = ocp.options.PyTreeOptions(
        loading=ocp.options.PyTreeOptions.Loading(partial_load=True)
    )
    with ocp.Context(pytree_options=options):
        found = ocp.load(place, target)
    leaves = [found[pairs[n]] if n in pairs else leaf for n, leaf in ours.items()]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def finished(folder: Path) -> Path:
    """The last checkpoint of a finished run.

    Raises:
      LclmError: there is none.
    """
    steps = steps_in(folder / "checkpoints")
    if not (folder / "model").is_dir() or not steps:
        what = "is not there" if not folder.exists() else "is no finished run"
        raise LclmError(
            f"start_from: {str(folder)!r} {what} (a finished one has model/ and "
            "checkpoints/); finish it first, or take its weights with model.source"
        )
    return (folder / "checkpoints" / str(steps[-1])).absolute()


def _moments(ours: dict[str, Any], theirs: Any) -> dict[str, str]:
    """Our names of Adam's state -> theirs; its place in the chain may differ."""
    found = {}
    for name in ours:
        if match := MOMENT.match(name):
            tail = name.removeprefix(match[1])
            same = [n for n in theirs if MOMENT.match(n) and n.endswith("." + tail)]
            if not same:
                raise LclmError(
                    f"carry_optimizer: the earlier run has no moments for {tail!r}; "
                    "set carry_optimizer=False"
                )
            found[name] = same[0]
            head = MOMENT.match(same[0])
            found[match[1] + "count"] = head[1] + "count"
    return found
