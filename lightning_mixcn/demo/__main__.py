"""``python -m lightning_mixcn.demo``: adapt a real base to Chinese in 4 bits, teach it to answer, and to prefer."""

import argparse
import sys

from lightning_mixcn.commands.process import CommandFailed

from .instruct import run_instruct_demo
from .preference import run_preference_demo
from .run import run_demo

_DEMOS = {
    "pretrain": lambda: run_demo(),
    "instruct": lambda: run_instruct_demo(),
    "preference": lambda: run_preference_demo(),
}


def run_chosen_demo() -> int:
    """Run the demo in the present folder.

    Returns:
        Exit code: 0, or 2 with one line on stderr.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_mixcn.demo", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "which", nargs="?", default="pretrain", choices=list(_DEMOS),
        help="pretrain: continued pre-training on Chinese text (make demo); instruct: instruction tuning, and a chat "
        "(make demo-instruct); preference: DPO after it (make demo-preference)",
    )  # fmt: skip
    chosen = parser.parse_args().which
    try:
        _DEMOS[chosen]()
    except (ConnectionError, CommandFailed, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: stopped; what is complete under .cache/demo is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_chosen_demo())
