"""What the documents show is true: links, targets, commands, calls."""

import ast
import contextlib
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest

import lclm
from lclm.cli import options
from lclm.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, text)
        for page in PAGES
        for kind, text in BLOCK.findall(page.read_text())
        if kind == language
    ]


def commands(program: str, *, inline: bool = True) -> list[str]:
    """Command lines in shell blocks, and in running text too unless told not to."""
    lines = [line for _, text in blocks("bash") for line in text.splitlines()]
    lines += [
        span
        for page in PAGES
        if inline
        for span in re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text()))
    ]
    found = [line.partition("  #")[0].strip() for line in lines]
    return sorted({line for line in found if re.match(rf"{program} \S", line)})


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_exist_and_say_what_they_do():
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    shown = {line.split()[1] for line in commands("make")}
    assert shown and shown <= set(targets), shown - set(targets)


def test_the_tested_command_is_the_documented_one():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make lint" in script and "make test" in script
    assert {"make test", "make demo", "make lint"} <= set(commands("make"))


class Understood(Exception):
    """The command line was accepted."""


@pytest.mark.parametrize("line", commands("lclm", inline=False))
def test_a_shown_command_is_understood(line, monkeypatch):
    def understood(read):
        def stop(self, argv):
            read(self, argv)
            raise Understood

        return stop

    for name in ("parse_args", "parse_intermixed_args"):
        read = getattr(options.Parser, name)
        monkeypatch.setattr(options.Parser, name, understood(read))
    argv = shlex.split(line)[1:]
    assert argv[0] in COMMANDS
    for config in re.findall(r"--config=(\S+)", line):
        assert (ROOT / config).exists()
    with pytest.raises(Understood):
        main(argv)


@pytest.mark.parametrize(("page", "source"), blocks("python"))
def test_a_shown_call_fits_its_signature(page, source):
    from lclm.language_model import Context, LanguageModel

    known = {"lclm": lclm, "lm": LanguageModel, "context": Context}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        if not isinstance(owner, ast.Name) or owner.id not in known:
            continue
        function = getattr(known[owner.id], node.func.attr)
        bound = [] if owner.id == "lclm" else [None]
        keywords = {k.arg: None for k in node.keywords}
        inspect.signature(function).bind(*bound, *node.args, **keywords)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("page", ["README.md", "guide.md", "caches.md"])
def test_the_shown_python_runs(page):
    spoken = io.StringIO()
    source = "\n".join(text for name, text in blocks("python") if name == page)
    with contextlib.redirect_stdout(spoken):
        exec(compile(source, page, "exec"), {})
    assert spoken.getvalue().strip()
