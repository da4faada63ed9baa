"""The file that a benchmark leaves."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def require_new(path: Path) -> None:
    """Make the folder of a result; ends the program if there is such a result already."""
    if path.exists():
        sys.exit(f"{path} exists; move it away, results are not overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)


def record(path: Path, head: Sequence[str], lines: Iterable[str]) -> None:
    """Print lines of Markdown as they come, and write all of them at the end.

    Args:
        path: of the result.
        head: what stands before the first of them.
        lines: measured while they are asked for.
    """
    print("\n".join(head))
    written = list(head)
    for line in lines:
        print(line, flush=True)
        written.append(line)
    path.write_text("\n".join(written).rstrip() + "\n")
    print(f"\nwritten to {path}")
