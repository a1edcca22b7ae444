"""Small runs with every kind of figure, made with scripted models."""

import io
import shutil
from pathlib import Path

from eval_doubles import PROSE, Said, Scripted
from rich.console import Console

from lclm.cli.run import run
from lclm.serve.result import Stats

CACHE, OTHER = "streaming:sinks=4,window=60", "h2o:budget=64"
RUDE = "<script>alert('1')</script> & \"so\" on"
CONFIG = """
import ml_collections

def get_config(source={source!r}, points=0, cache={cache!r}):
    c = ml_collections.ConfigDict()
    c.name, c.title, c.about = "run", "A <small> run", "Every figure & table."
    c.models = [dict(name="plain", source="scripted")]
    caches = ["full", cache]
    c.stages = [
        dict(eval="perplexity", source=source, length=1050, splits=[500], bucket=25,
             readings=[dict(cache=name) for name in caches]),
        dict(eval="passkey", title="Keys <b>", lengths=[300, 400], depths=[0.2, 0.8],
             caches=caches),
        dict(eval="lost_in_the_middle", kind="kv", total=9, limit=1,
             strategies=["whole", "closed_book"]),
    ]
    if points:
        c.stages.append(dict(
            eval="needle", lengths=[300, 500, 700, 900, 1200, 1600, 2000],
            source=source, points=points, caches=caches, questions="hidden"))
    return c
"""


class Costly(Scripted):
    """Tells what its answers cost; knows no other word than a rude one where a cache
    let go of the key."""

    def generate(self, prompt, *, max_new_tokens, cache="full", room=0):
        if cache != "full":
            self.sees, kept = 200, self.sees
        said = super().generate(
            prompt, max_new_tokens=max_new_tokens, cache=cache, room=room
        )
        if cache != "full":
            self.sees = kept
        found = Said(said.text if said.text.strip(" .") else RUDE)
        size = len(self.encode(prompt) if isinstance(prompt, str) else prompt)
        found.stats = self.stats(cache, size)
        return found

    def prefill(self, text, *, cache="full", room=0):
        read = super().prefill(text, cache=cache, room=room)
        read.stats = self.stats(cache, len(read.ids))
        return read

    def stats(self, cache, size):
        return Stats(self.cache_bytes(cache, size), None, size, 8, size / 100, 0.5)


def make_run(folder: Path, tokenizer, *, options="") -> Path:
    """A finished run of `CONFIG`, `folder`/first."""
    text, config = folder / "prose.txt", folder / "every.py"
    text.write_text(PROSE, encoding="utf-8")
    config.write_text(CONFIG.format(source=f"local:path={text}", cache=CACHE))
    lm = Costly(tokenizer)
    run(
        f"{config}{options}",
        workdir=folder / "first",
        load=lambda *a, **k: lm,
        console=Console(file=io.StringIO(), width=120),
    )
    return folder / "first"


def run_like(first: Path) -> Path:
    """The same run beside it, "second", as if another cache had given its records."""
    second = first.with_name("second")
    shutil.copytree(first, second)
    for name in ("run.json", "metrics.jsonl"):
        text = (second / name).read_text()
        (second / name).write_text(text.replace(CACHE, OTHER))
    return second
