"""`lclm list`: every table of names the library has."""

from collections.abc import Sequence

from lclm.cli.options import Parser
from lclm.registry import Entry, Table

TABLES = Table(
    "table",
    {
        "models": Entry("lclm.hub:KNOWN", "models that `lclm pull` fetches"),
        "caches": Entry("lclm.cache:POLICIES", "what survives of the past"),
        "patterns": Entry("lclm.attention:PATTERNS", "which keys a query sees"),
        "mixers": Entry("lclm.blocks:MIXERS", "how tokens mix"),
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
        for entry, about in lines.items():
            print(f"  {entry:16}{about}")


def _about(known: dict) -> dict[str, str]:
    return {name: model.about for name, model in known.items()}
