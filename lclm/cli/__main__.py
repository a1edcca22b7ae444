"""`python -m lclm.cli` is the `lclm` command."""

import sys

from lclm.cli.main import main

sys.exit(main())
