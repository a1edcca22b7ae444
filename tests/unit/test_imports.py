"""Holds the import map of docs/architecture.md and the house limits on size."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNEL_IMPORTS = {"jax", "numpy", "pallas_kernels"}
LINES = 80
# A kernel lists its arrays. The public `generate` spells its sampling out. Private
# functions may be wide: a jitted step lists its arrays and its statics.
ARGUMENTS = {"lclm": 9, "pallas_kernels": 12}
WIDE = {"generate"}
FILE_LINES = {"lclm": 500, "pallas_kernels": 875}


def levels() -> dict[str, int]:
    """Part of `lclm` -> its level, 0 on top, as docs/architecture.md draws it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"```import-map\n(.*?)```", text, re.DOTALL)
    assert block, "docs/architecture.md has no import-map block"
    rows = [re.findall(r"[a-z_]+", row) for row in block[1].splitlines()]
    parts = [part for row in rows for part in row]
    assert len(parts) == len(set(parts)), "a part stands twice in the import map"
    return {part: level for level, row in enumerate(rows) for part in row}


def sources(*folders: str) -> list[Path]:
    return sorted(path for f in folders for path in (ROOT / f).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every dotted name that a file imports, at any depth, relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            if stem == "lclm":
                names |= {f"lclm.{alias.name}" for alias in node.names}
            else:
                names.add(stem)
    return names


def part_of(name: str, known: dict[str, int]) -> str | None:
    """The part of `lclm` a dotted name is in; the surface itself is on top."""
    head, *rest = name.split(".")
    if head != "lclm":
        return None
    part = rest[0] if rest else ""
    here = ROOT / "lclm" / part
    if not part or not (here.is_dir() or here.with_suffix(".py").exists()):
        return "language_model"
    assert part in known, f"lclm.{part} has no place in the import map"
    return part


def breaches(where: str, names: set[str], known: dict[str, int]) -> list[str]:
    """Imports of module `where` that go up the map or sideways in the middle of it."""
    own, floor = part_of(where, known), max(known.values())
    found = []
    for name in sorted(names):
        part = part_of(name, known)
        if part is None or part == own:
            continue
        sideways = known[part] == known[own] and known[own] not in (0, floor)
        if known[part] < known[own] or sideways:
            found.append(f"{where} ({own}) imports {name} ({part})")
    return found


def test_imports_point_down_the_map():
    known, found = levels(), []
    for path in sources("lclm"):
        where = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found += breaches(where.removesuffix(".__init__"), imports(path), known)
    assert not found, "\n".join(found)


def test_kernels_import_nothing_of_ours():
    for path in sources("pallas_kernels"):
        heads = {name.split(".")[0] for name in imports(path)}
        extra = heads - KERNEL_IMPORTS - sys.stdlib_module_names
        assert not extra, f"{path.name} imports {extra}"


def test_configs_import_only_ml_collections():
    for path in sources("configs"):
        heads = {name.split(".")[0] for name in imports(path)}
        assert heads <= {"ml_collections"}, f"{path.name} imports {heads}"


def test_nobody_imports_the_tests_or_the_edges():
    for path in sources("lclm", "pallas_kernels", "configs"):
        heads = {name.split(".")[0] for name in imports(path)}
        assert not heads & {"tests", "benchmarks", "experiments", "torch", "tensorflow"}


@pytest.mark.parametrize("folder", ["lclm", "pallas_kernels"])
def test_functions_and_files_stay_small(folder):
    found = []
    for path in sources(folder):
        text = path.read_text()
        if text.count("\n") > FILE_LINES[folder]:
            found.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                count = len(node.args.args) + len(node.args.kwonlyargs)
                wide = count > ARGUMENTS[folder] and node.name not in WIDE
                if lines > LINES or (wide and not node.name.startswith("_")):
                    at = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                    found.append(f"{at}: {lines} lines, {count} arguments")
    assert not found, "\n".join(found)


def test_an_import_that_points_up_or_sideways_is_found():
    known = levels()
    assert breaches("lclm.ops.rope", {"lclm.models.decoder"}, known)
    assert breaches("lclm.evals.passkey", {"lclm.serve"}, known)
    assert breaches("lclm.models", {"lclm"}, known)
    assert breaches("lclm.config", {"lclm.ops"}, known)
    allowed = {"lclm.ops", "lclm.errors", "pallas_kernels.mask", "jax.numpy"}
    assert not breaches("lclm.models.decoder", allowed, known)
    assert not breaches("lclm.cli.main", {"lclm", "lclm.serve"}, known)
