"""What an uneven load costs where experts are spread over ranks, by a model whose every assumption is stated."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from jaxtyping import Int
from torch import Tensor

from moe.config import require_positive, require_positive_integer
from moe.errors import ConfigError, DtypeError, ShapeError


@final
@dataclass(frozen=True)
class ImbalancePrice:
    """Time and bytes of one layer's experts in a mean step: on the busiest rank, and with evenly loaded ranks."""

    factor: float
    """Rows on the busiest rank over the mean of all ranks: 1 is even, the number of ranks is all on one."""
    compute_seconds: float
    """Of the busiest rank's experts, which all others wait for."""
    even_compute_seconds: float
    """The same with evenly loaded ranks."""
    exchange_bytes: float
    """Of the busiest rank's rows that come from other ranks."""
    even_exchange_bytes: float
    """The same with evenly loaded ranks."""
    exchange_seconds: float
    """In which ``exchange_bytes`` travel."""
    even_exchange_seconds: float
    """The same with evenly loaded ranks."""

    @property
    def seconds_lost(self) -> float:
        """Computing and exchanging, less the same with evenly loaded ranks."""
        return self.compute_seconds - self.even_compute_seconds + self.exchange_seconds - self.even_exchange_seconds

    @property
    def share_lost(self) -> float:
        """``seconds_lost`` over computing and exchanging, which is ``1 - 1 / factor``; 0 without rows."""
        total = self.compute_seconds + self.exchange_seconds
        return self.seconds_lost / total if total else 0.0

    @property
    def bytes_lost(self) -> float:
        """``exchange_bytes`` beyond those with evenly loaded ranks."""
        return self.exchange_bytes - self.even_exchange_bytes


def price_of_imbalance(
    tokens_per_expert: Int[Tensor, "*S E"],
    num_ranks: int,
    *,
    flops_per_assignment: float,
    bytes_per_assignment: float,
    flops_per_second: float,
    bytes_per_second: float,
    bounds: Sequence[int] | None = None,
) -> ImbalancePrice:
    """Price measured loads at an expert-parallel degree, whatever the degree at which they were measured.

    With n_r the rows (assignments) of rank r's experts in a step, R ranks, and ``<...>`` the mean over steps::

        busiest = <max_r n_r>                       even = <sum_r n_r> / R
        factor  = busiest / even
        compute_seconds  = busiest * flops_per_assignment / flops_per_second
        exchange_bytes   = busiest * bytes_per_assignment * (R - 1) / R
        exchange_seconds = exchange_bytes / bytes_per_second

    and each ``even_`` figure the same with ``even`` in the place of ``busiest``.

    A step ends when its busiest rank is done, so the maximum is taken in each step, then the mean. Counts pooled over
    steps hide what changes sides from step to step: they are never dearer, and usually cheaper, than their steps.

    This is a model, and what it leaves out makes the real price differ: time is proportional to rows (small products
    are slower a row than large ones); computing and exchanging do not overlap; a step's tokens are spread evenly over
    ranks, so that 1/R of the rows are there already; each row travels for itself (``moe.parallel`` sends a token once
    to a rank that has several of its experts, so fewer bytes travel); nothing but this layer's experts is waited for.

    Args:
        tokens_per_expert: integer counts ``(E,)`` of one step, or ``(S, E)`` of several; without null experts, which
            are on no rank. With a capacity: what was kept.
        num_ranks: R, that hold all experts once.
        flops_per_assignment: of one token in one expert, 2 for a multiplication and its addition. Forward alone of a
            SwiGLU expert: ``6 * dim * hidden_dim``; forward and backward: three times that.
        bytes_per_assignment: of one token on its ways between ranks that shall count. There and back in bfloat16:
            ``2 * 2 * dim``; forward and backward: twice that.
        flops_per_second: that a rank reaches in its experts.
        bytes_per_second: at which a rank exchanges rows, all ways that ``bytes_per_assignment`` counts together.
        bounds: rank r has the experts from ``bounds[r]`` up to ``bounds[r + 1]``, ``R + 1`` numbers from 0 to E. None:
            consecutive experts, as evenly as they go, where ``moe.parallel`` puts them.

    Returns:
        Plain numbers; waits for the device.

    Raises:
        ConfigError: costs that are not positive, fewer than one rank or more than experts, bounds that do not fit,
            negative counts.
        DtypeError: counts that are no integers.
        ShapeError: counts of another shape, or of no step.
    """
    require_positive_integer(num_ranks=num_ranks)
    require_positive(
        flops_per_assignment=flops_per_assignment,
        bytes_per_assignment=bytes_per_assignment,
        flops_per_second=flops_per_second,
        bytes_per_second=bytes_per_second,
    )
    steps = _steps(tokens_per_expert)
    edges = _edges(bounds, steps.shape[1], num_ranks)
    busiest, even = _busiest_and_even(steps.tolist(), edges)
    seconds = flops_per_assignment / flops_per_second
    arriving = bytes_per_assignment * (num_ranks - 1) / num_ranks
    return ImbalancePrice(
        factor=busiest / even if even else 1.0,
        compute_seconds=busiest * seconds,
        even_compute_seconds=even * seconds,
        exchange_bytes=busiest * arriving,
        even_exchange_bytes=even * arriving,
        exchange_seconds=busiest * arriving / bytes_per_second,
        even_exchange_seconds=even * arriving / bytes_per_second,
    )


def _busiest_and_even(steps: list[list[int]], edges: Sequence[int]) -> tuple[float, float]:
    """Mean rows of a step on its busiest rank, and on a mean rank; whole numbers until they are divided."""
    rows = [[sum(step[start:end]) for start, end in pairwise(edges)] for step in steps]
    return sum(map(max, rows)) / len(steps), sum(map(sum, rows)) / (len(steps) * (len(edges) - 1))


def _steps(counts: Tensor) -> Tensor:
    """The counts as ``(S, E)``."""
    if counts.is_floating_point() or counts.is_complex():
        raise DtypeError(f"tokens_per_expert has dtype {counts.dtype}, but counts are integers")
    if counts.dim() not in (1, 2) or counts.numel() == 0:
        raise ShapeError(f"tokens_per_expert of shape {tuple(counts.shape)} must be (experts,) or (steps, experts)")
    if (counts < 0).any():
        raise ConfigError(f"tokens_per_expert has {counts.min().item()}, but counts must not be negative")
    return counts.reshape(-1, counts.shape[-1])


def _edges(bounds: Sequence[int] | None, num_experts: int, num_ranks: int) -> tuple[int, ...]:
    """The given bounds if they fit, else the even ones."""
    if bounds is None:
        if num_ranks > num_experts:
            raise ConfigError(f"num_ranks={num_ranks} is more than {num_experts} experts: a rank would hold none")
        return tuple(num_experts * rank // num_ranks for rank in range(num_ranks + 1))
    edges = tuple(bounds)
    if len(edges) != num_ranks + 1 or edges[0] != 0 or edges[-1] != num_experts or list(edges) != sorted(edges):
        raise ConfigError(f"bounds={edges} must be {num_ranks + 1} numbers that ascend from 0 to {num_experts}")
    return edges
