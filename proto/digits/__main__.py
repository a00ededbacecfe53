"""``python -m digits`` is the ``digits`` command."""

import sys

from digits.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
