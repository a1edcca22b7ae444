"""`lclm pull`: fetch a known model."""

from collections.abc import Sequence

from lclm.cli.options import Parser


def main(argv: Sequence[str]) -> None:
    """Fetch, verify and keep one model; print where it is."""
    parser = Parser("pull", "Fetch a known model into the cache folder, once.")
    parser.add_argument("name", help="a name that `lclm list models` prints")
    parser.add_argument("--accept", metavar="LICENCE", help="terms you have read")
    args = parser.parse_args(argv)

    from lclm import hub

    print(hub.pull(args.name, accept=args.accept))
