"""Lists the runs in a folder: how far each is, its eval loss and training time, its deciding score, and what differs.

    python train/runs.py
    python train/runs.py outputs/bits

Runs on the same data stand together, the best first; those of a sweep count too. Below each run stand the keys that are not
equal in all runs on its data, and what is wrong with it. The deciding score is the recipe's primary_metric of the tuned model
on the test questions, once eval/run.py has asked them. Nothing is changed, and no model is loaded.

exit status: 0 the table is printed, 2 there is no run.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, interrupts, ranks  # noqa: F401
from carelm.command_line import refuse
from carelm.sweep.overview import overview


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("outputs"), help="holds the runs, or is one (default: outputs)"
    )
    parser.error = refuse
    return parser.parse_args()


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads the table may have enough of it
    print(overview(parse().folder))


if __name__ == "__main__":
    ranks.run_main(main)
