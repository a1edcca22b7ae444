"""What a loaded model is before anything runs: description, weights, tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lclm.config import ModelConfig
from lclm.errors import LclmError
from lclm.hub.tokenizer import TextCodec


@dataclass(frozen=True)
class Bundle:
    """A model as data. `params` is the nested tree, weights [out, in].

    `tokenizer` is None where the source has none; `source` is what was asked for;
    `folder` is the folder or file the weights came from.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: TextCodec | None = None
    source: str = ""
    folder: Path | None = field(default=None, compare=False)


def check_shapes(
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    where: str,
) -> None:
    """Compare names and shapes before any weight is read; name every difference."""
    problems = []
    missing = [n for n in expected if n not in found]
    extra = [n for n in found if n not in expected]
    if missing:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} not part of this model: {_some(extra)}")
    wrong = [
        f"{n} is {found[n]}, expected {expected[n]}"
        for n in expected
        if n in found and tuple(found[n]) != tuple(expected[n])
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {_some(wrong)}")
    if problems:
        raise LclmError(
            f"{where}: the tensors do not fit the model description; "
            f"{'; '.join(problems)}. Check that weights and config belong together."
        )


def _some(names: list[str], most: int = 1000) -> str:
    tail = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + tail
