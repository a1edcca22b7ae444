"""`python -m lclm` is the command `lclm`."""

from lclm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
