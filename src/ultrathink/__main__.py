"""``python -m ultrathink`` is the command ``ultrathink``."""

import sys

from ultrathink.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
