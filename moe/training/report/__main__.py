"""``python -m moe.training.report <run folder>`` makes a run's page again from its files."""

import argparse
import sys
from pathlib import Path

from moe.errors import MoEError
from moe.training.report.page import write_report
from moe.training.run_folder import RunFolder


def main() -> int:
    """Write the report of the run folder named on the command line and print its path."""
    parser = argparse.ArgumentParser(prog="python -m moe.training.report", description="Make a run's report.html.")
    parser.add_argument("run_folder", type=Path, help="a folder with metrics.jsonl, such as runs/<name>")
    try:
        print(write_report(RunFolder(parser.parse_args().run_folder)))
    except MoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
