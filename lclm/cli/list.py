"""`lclm list`: every table of names the library has."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lclm.cli.options import Parser
from lclm.registry import Entry, Table

if TYPE_CHECKING:
    from lclm.config import ModelConfig

TABLES = Table(
    "table",
    {
        "models": Entry("lclm.hub:KNOWN", "models that `lclm pull` fetches"),
        "presets": Entry("lclm.models.presets:PRESETS", "shapes of published models"),
        "caches": Entry("lclm.cache:POLICIES", "what survives of the past"),
        "patterns": Entry("lclm.attention:PATTERNS", "which keys a query sees"),
        "mixers": Entry("lclm.blocks:MIXERS", "how tokens mix"),
        "feed-forwards": Entry("lclm.blocks:FEED_FORWARDS", "what follows the mixer"),
        "texts": Entry("lclm.data.sources:SOURCES", "single texts to read"),
        "documents": Entry("lclm.data.documents:DOCUMENTS", "sources to train on"),
        "synthetic": Entry("lclm.data.documents:SYNTHETIC", "made-up tasks"),
        "labelled": Entry(
            "lclm.evals.labelled:LABELLED", "labelled texts for many-shot recall"
        ),
        "evals": Entry("lclm.evals:EVALS", "what can be measured"),
    },
)


def main(argv: Sequence[str]) -> None:
    """Print the tables, or one of them."""
    parser = Parser("list", "Names that configs, Python and the shell accept.")
    parser.add_argument("table", nargs="?", choices=tuple(TABLES))
    args = parser.parse_args(argv)
    for name in [args.table] if args.table else TABLES:
        print(f"{name}: {TABLES.entries[name].about}")
        table = TABLES[name]
        lines = table.about() if isinstance(table, Table) else _about(table)
        width = max(20, *(len(entry) + 2 for entry in lines))
        for entry, about in lines.items():
            print(f"  {entry:{width}}{about}")


def _about(known: dict) -> dict[str, str]:
    """Lines about models to pull, or about presets (functions that make a shape)."""
    return {
        name: _shape(model()) if callable(model) else model.about
        for name, model in known.items()
    }


def _shape(config: "ModelConfig") -> str:
    kinds = " + ".join(dict.fromkeys(layer.mixer.TYPE for layer in config.layers))
    return f"{len(config.layers)} x {config.width}, {kinds}, context {config.context}"
