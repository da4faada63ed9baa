"""What a verification is asked to do."""

from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import final

import torch

from moe.config import option, require_positive, require_positive_integer
from moe.errors import ConfigError
from moe.parallel import Degrees
from moe.parallel.degrees import spans_nodes
from moe.verify.faults import FAULTS

MAX_RANKS = 64
"""More processes than this on one machine are a typing error rather than a wish."""
SEQUENCES = 3
"""Rows of a micro-batch unless told otherwise: few, odd, and one less is still more than one."""


class Precision(StrEnum):
    """The dtype of parameters and of what is computed."""

    FLOAT64 = "float64"
    """Differences are mistakes: rounding is near 1e-15."""
    FLOAT32 = "float32"
    """As most people train; sums in another order differ near 1e-7."""
    BFLOAT16 = "bfloat16"
    """Differences are shown and judged only where a tolerance is given."""

    @property
    def dtype(self) -> torch.dtype:
        """Torch's."""
        found: torch.dtype = getattr(torch, self.value)
        return found

    @property
    def tolerance(self) -> float:
        """The largest relative error that passes unless told otherwise; see docs/howto/verify.md."""
        return {"float64": 1e-10, "float32": 1e-5, "bfloat16": float("inf")}[self.value]


@final
@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """How the check is run.

    Raises:
        ConfigError: a value is out of its range, or a fault has no such name.
    """

    dtype: str = "float64"
    """A member of ``Precision``."""
    steps: int = 3
    """Optimizer steps."""
    accumulate: int = 2
    """Backward passes a step on every data rank."""
    microbatches: int | None = None
    """Parts of a backward pass that are under way at once in a pipeline; None for one more than ``pp``."""
    stages_per_rank: int = 1
    """Of a pipeline; see :class:`moe.parallel.pipeline.Pipeline`."""
    batch_size: int | None = None
    """Rows of one step, over all data ranks and micro-batches; None for three rows a micro-batch."""
    chunks: int = 1
    """See ``moe.parallelize``."""
    max_received_tokens: int | None = None
    """See ``moe.parallelize``."""
    node_size: int | None = None
    """See :class:`moe.parallel.ParallelMesh`."""
    max_norm: float | None = None
    """Gradients are clipped to it; None for half the norm of the first step, so that clipping happens."""
    tolerance: float | None = None
    """Largest relative error; None for that of the dtype."""
    seed: int = 0
    """Of the parameters and the data."""
    compile: str | None = None
    """A backend of ``torch.compile`` for the model that is spread (never for the reference); None for none."""
    fault: str | None = None
    """A name in ``FAULTS``: planted in the ranks, to see it caught."""

    def __post_init__(self) -> None:
        option(Precision, "dtype", self.dtype)
        whole = ("steps", "accumulate", "chunks", "stages_per_rank")
        require_positive_integer(**{name: getattr(self, name) for name in whole})
        for name in ("microbatches", "batch_size", "max_received_tokens", "node_size"):
            if getattr(self, name) is not None:
                require_positive_integer(**{name: getattr(self, name)})
        for name in ("max_norm", "tolerance"):
            if getattr(self, name) is not None:
                require_positive(**{name: getattr(self, name)})
        if self.compile is not None and self.compile not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise ConfigError(f"compile={self.compile!r} is no backend of torch.compile; choose one of {known}")
        if self.fault is not None and self.fault not in FAULTS:
            near = get_close_matches(self.fault, FAULTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"fault={self.fault!r} is unknown{hint or '; `list` explains each'}")

    @property
    def precision(self) -> Precision:
        """Of ``dtype``."""
        return Precision(self.dtype)

    @property
    def allowed(self) -> float:
        """The largest relative error that passes."""
        return self.precision.tolerance if self.tolerance is None else self.tolerance

    def parts(self, degrees: Degrees) -> int:
        """Micro-batches of one backward pass: those of a pipeline, else one."""
        if degrees.pp == 1:
            return 1
        return degrees.pp + 1 if self.microbatches is None else self.microbatches

    def micro_batch_size(self, degrees: Degrees) -> int:
        """Rows of one micro-batch.

        Raises:
            ConfigError: ``batch_size`` does not split.
        """
        total = degrees.dp * self.accumulate * self.parts(degrees)
        if self.batch_size is None:
            return SEQUENCES
        if self.batch_size % total:
            stages = f" * microbatches={self.parts(degrees)}" if degrees.pp > 1 else ""
            raise ConfigError(
                f"batch_size={self.batch_size} does not split over dp_replicate={degrees.dp_replicate} * dp_shard="
                f"{degrees.dp_shard} * accumulate={self.accumulate}{stages} = {total} micro-batches; take a multiple "
                f"of {total}"
            )
        return self.batch_size // total


def check_degrees(degrees: Degrees, options: VerifyOptions) -> None:
    """Refuse what cannot be run here, before a process is started.

    Raises:
        ConfigError: options of a pipeline where there is none, fewer micro-batches than stages, too many ranks, nodes
            that the experts do not fit, or a limit of received tokens that no round keeps.
    """
    if degrees.pp == 1 and (options.microbatches is not None or options.stages_per_rank > 1):
        raise ConfigError(
            f"microbatches={options.microbatches} and stages_per_rank={options.stages_per_rank} are of a pipeline; "
            f"degrees {degrees} have none: add pp=2 or leave them out"
        )
    if options.parts(degrees) < degrees.pp:
        raise ConfigError(f"microbatches={options.microbatches} must be at least pp={degrees.pp}")
    if degrees.world_size > MAX_RANKS:
        raise ConfigError(
            f"degrees {degrees} need {degrees.world_size} ranks, each a process of this machine; at most {MAX_RANKS}"
        )
    if options.node_size is not None:
        spans_nodes(degrees, options.node_size)
    held, limit = degrees.ep * degrees.etp, options.max_received_tokens
    if limit is not None and limit < held:
        raise ConfigError(
            f"max_received_tokens={limit} must be at least ep={degrees.ep} * etp={degrees.etp} = {held}, a row from "
            "each rank of the exchange"
        )
    options.micro_batch_size(degrees)
