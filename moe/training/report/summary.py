"""What a report needs to know about a run beside its settings and its metrics."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from moe.errors import DataError
from moe.training.atomic import replace_text
from moe.training.run_folder import RunFolder


@dataclass(frozen=True)
class RunSummary:
    """Facts about a run that are known once, not step by step; what is not known is left out of the page."""

    total_parameters: int | None = None
    """Parameters of the model."""

    active_parameters: int | None = None
    """Parameters that one token meets: all but the experts it is not sent to."""

    top_k: int = 0
    """Experts per token, K; 0 for a dense model. With it goes MaxVio's sampling floor."""

    pooled_steps: int = 50
    """Steps whose counts one MaxVio of training is made from."""

    validation_tokens: int | None = None
    """Tokens in one validation, for the sampling floor of its MaxVio."""

    unigram_bits_per_byte: float | None = None
    """What a model that knows only each byte's frequency needs on the validation text."""

    gzip_bits_per_byte: float | None = None
    """What ``gzip -9`` needs on the validation text."""

    skipped_count: int = 0
    """Data files and records that were not read."""

    skipped_files: tuple[str, ...] = ()
    """Data files that were not read, each with the reason."""

    prompt: str = ""
    """What the sample was asked to continue."""

    sample: str = ""
    """Text the trained model wrote, without the prompt."""

    hardware: str = ""
    """What the run ran on, in words."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Version of each package that matters, by name."""


def write_summary(folder: RunFolder, summary: RunSummary) -> None:
    """Store a summary in its run's folder.

    Args:
        folder: the run.
        summary: the facts.
    """
    replace_text(folder.summary, json.dumps(asdict(summary), indent=2) + "\n")


def read_summary(folder: RunFolder) -> RunSummary:
    """Read a run's summary.

    Args:
        folder: the run.

    Returns:
        The facts; an empty summary where the run died before it wrote one.

    Raises:
        DataError: the file is not a summary.
    """
    if not folder.summary.exists():
        return RunSummary()
    try:
        facts = json.loads(folder.summary.read_text(encoding="utf-8"))
        return RunSummary(**(facts | {"skipped_files": tuple(facts.get("skipped_files", ()))}))
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"path={str(folder.summary)!r} is not a run's summary: {error}") from error
