"""Config files: `path/to/config.py:key=value,...` -> what its `get_config` returns."""

import ast
import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lclm.errors import LclmError, did_you_mean

if TYPE_CHECKING:
    from lclm.train.config import Mesh


def read_config(spec: str) -> Any:
    """The ConfigDict of a file, its `get_config` called with the options of `spec`.

    `data` may be such a spec itself: the `data` of that config then takes its place.

    Raises:
      LclmError: no such file, no `get_config`, an unknown or mistyped option.
    """
    path, options = _split(spec)
    config = _call(_get_config(path), options, path=path)
    data = config.get("data") if hasattr(config, "get") else None
    if not isinstance(data, str):
        return config
    shared = read_config(data)
    if "data" not in shared:
        raise LclmError(f"{spec}: data is {data!r}, a config without `data`")
    return {**_plain(config), "data": _plain(shared["data"])}


def read_mesh(text: str) -> "Mesh":
    """`fsdp=4,context_ring=4` as a mesh. Raises LclmError for what it does not know."""
    from lclm.config import from_dict
    from lclm.train.config import Mesh

    sizes: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise LclmError(f"mesh {text!r}: {part!r} is not AXIS=SIZE, as in fsdp=8")
        try:
            sizes[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            sizes[key] = value
    return from_dict(Mesh, sizes)


def _plain(config: Any) -> Any:
    return config.to_dict() if hasattr(config, "to_dict") else config


def _split(spec: str) -> tuple[Path, dict[str, str]]:
    path, colon, rest = spec.partition(".py:")
    options: dict[str, str] = {}
    for part in filter(None, rest.split(",") if colon else []):
        key, equals, value = part.partition("=")
        if not equals:
            raise LclmError(f"config {spec!r}: {part!r} is not KEY=VALUE; add the '='")
        options[key] = value
    return Path(path + ".py" if colon else path), options


def _get_config(path: Path):
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.py"))
        hint = f"; that folder has {', '.join(near)}" if near else ""
        raise LclmError(f"no config file {str(path)!r}{hint}")
    spec = importlib.util.spec_from_file_location(f"lclm_config_{path.stem}", path)
    if spec is None:
        raise LclmError(
            f"config {str(path)!r} is not a Python file: it must end in .py"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise LclmError(f"config {str(path)!r} cannot be read: {error}") from error
    if not callable(getattr(module, "get_config", None)):
        raise LclmError(f"config {str(path)!r} has no function get_config()")
    return module.get_config


def _call(get_config, options: dict[str, str], *, path: Path) -> Any:
    """`get_config` with options typed as its defaults are."""
    known = inspect.signature(get_config).parameters
    values = {}
    for key, text in options.items():
        if key not in known:
            allowed = ", ".join(f"{k}={p.default!r}" for k, p in known.items())
            raise LclmError(
                f"{path.name} has no option {key!r}: known are {allowed or 'none'}"
                f"{did_you_mean(key, known)}"
            )
        values[key] = _typed(text, known[key].default, f"{path.name}:{key}")
    return get_config(**values)


def _typed(text: str, default: Any, where: str) -> Any:
    if isinstance(default, str) or default is inspect.Parameter.empty:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise LclmError(
            f"{where} is {text!r}; expected {type(default).__name__}, for instance "
            f"{default!r}"
        )
    return value
