"""``python -m lightning_mixcn.demo``: adapt a real base to Chinese, in 4 bits, in minutes."""

import argparse
import sys

from lightning_mixcn.demo.commands import CommandFailed
from lightning_mixcn.demo.run import run_demo


def main() -> int:
    """Run the demo in the present folder.

    Returns:
        Exit code: 0, or 2 with one line on stderr.
    """
    argparse.ArgumentParser(prog="python -m lightning_mixcn.demo", description=run_demo.__doc__).parse_args()
    try:
        run_demo()
    except (ConnectionError, CommandFailed, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: stopped; what is complete under .cache/demo is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
