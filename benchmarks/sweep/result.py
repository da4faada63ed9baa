"""What a training leaves for the report: what was measured, not what follows from it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from moe.training.atomic import replace_text

FORMAT = 1
"""Raised when a result of before means something else now, so that its training is done again."""

Load = Mapping[str, Any]
"""The counts of one layer, see ``moe.LoadStats.to_numbers``."""


@final
@dataclass(frozen=True)
class Result:
    """One training that has ended."""

    format: int
    fingerprint: str
    """Three of the job, see `sweep.job.Job`."""
    pair: str
    sweep: str
    router: str
    balance: str
    kind: str
    """What balances: "nothing", "loss", "bias" or "loss and bias"."""
    seed: int
    top_k: int
    loss: float
    """Validation, nats a token."""
    bits_per_byte: float
    steps: list[dict[str, Load]]
    """The load of each layer in each training step."""
    evaluation: dict[str, Load]
    """The load of each layer over the whole validation, in evaluation mode."""
    step_seconds: list[float]
    """From the end of a step to that of the next; validation is in none of them."""
    seconds: float
    """From the start to the end, data and report included."""
    ended: float
    """Seconds since 1970."""
    machine: str
    """Versions, processor and threads."""


def write_result(path: Path, result: Result) -> None:
    """Put the file in place whole; its folder exists."""
    replace_text(path, json.dumps(asdict(result)))


def read_result(path: Path, fingerprint: str | None = None) -> Result | None:
    """Read a file back.

    Args:
        path: of the file.
        fingerprint: of the settings that the training must have had; None for any.

    Returns:
        None if there is no such file, it is torn, or it is of another format or other settings.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        result = Result(**found)
    except (OSError, ValueError, TypeError):
        return None
    return result if result.format == FORMAT and fingerprint in (None, result.fingerprint) else None
