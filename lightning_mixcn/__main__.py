"""``python -m lightning_mixcn`` is ``mixcn``."""

import sys

from lightning_mixcn.cli import main

if __name__ == "__main__":
    sys.exit(main())
