"""A read context as one safetensors file."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lclm import cache as policies
from lclm.config import to_dict
from lclm.errors import LclmError
from lclm.serve.calls import Engine
from lclm.serve.result import Stats
from lclm.serve.session import Session


def save(file: str | Path, session: Session, stats: Stats, single: bool) -> None:
    """Write caches, positions and the policy that owns them (whole or not at all)."""
    leaves = jax.tree.leaves(session.caches)
    arrays = {f"cache.{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    arrays["start"], arrays["last"] = session.start, np.asarray(session.last)
    policy = session.policy
    names = {target: name for name, target in _targets().items()}
    cls = f"{type(policy).__module__}:{type(policy).__qualname__}"
    if cls not in names:
        raise LclmError(f"{cls} is not a registered policy, so it cannot be saved")
    facts = {
        "policy": {"name": names[cls]}
        | {k: v for k, v in to_dict(policy).items() if v is not None},
        "length": session.length,
        "chunk": session.chunk,
        "free": None if session.free is None else session.free.tolist(),
        "single": single,
        "stats": asdict(stats),
        "model": to_dict(session.engine.config),
    }
    path = Path(file)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(arrays, temporary, metadata={"lclm": json.dumps(facts)})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(file: str | Path, engine: Engine) -> tuple[Session, Stats, bool]:
    """The inverse of `save`; the model must be the one that read the text."""
    if not Path(file).is_file():
        raise LclmError(f"no context file at {str(file)!r}: save one with Context.save")
    try:
        with safe_open(file, framework="numpy") as stored:
            facts = json.loads((stored.metadata() or {})["lclm"])
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise LclmError(
            f"{str(file)!r} is not a context written by Context.save: {error}"
        ) from None
    if facts["model"] != json.loads(json.dumps(to_dict(engine.config))):
        raise LclmError(
            f"{str(file)!r} was read by another model ({facts['model']['family']}); "
            "load it with the model that wrote it"
        )
    policy = policies.make(facts["policy"])
    session = Session(
        engine,
        policy,
        rows=len(arrays["start"]),
        length=facts["length"],
        chunk=facts["chunk"],
    )
    leaves, tree = jax.tree.flatten(session.caches)
    loaded = [jnp.asarray(arrays[f"cache.{i}"]) for i in range(len(leaves))]
    for i, (new, old) in enumerate(zip(loaded, leaves, strict=True)):
        if not _fits(new, old):
            raise LclmError(
                f"{str(file)!r}: array {i} is {new.dtype}{list(new.shape)}, expected "
                f"{old.dtype}{list(old.shape)}; load the model with the dtype it had"
            )
    session.caches = jax.tree.unflatten(tree, loaded)
    session.start = arrays["start"]
    if facts["free"] is not None:
        session.free = np.asarray(facts["free"], np.int32)
    session.last = jnp.asarray(arrays["last"])
    return session, Stats(**facts["stats"]), facts["single"]


def _fits(new: jax.Array, old: jax.Array) -> bool:
    """Whether a stored array is the one expected; a session may have had more slots."""
    if new.dtype != old.dtype or new.ndim != old.ndim:
        return False
    shapes = enumerate(zip(new.shape, old.shape, strict=True))
    return all(n == o or (axis == 2 and n > o) for axis, (n, o) in shapes)


def _targets() -> dict[str, str]:
    return {name: entry.target for name, entry in policies.POLICIES.entries.items()}
