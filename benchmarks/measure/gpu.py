"""What a GPU could do at most, and how much of that a contestant reaches."""

from dataclasses import dataclass
from statistics import median
from typing import final

import torch
from peers.contestant import Case, Contestant

from measure.timing import Clock


@final
@dataclass(frozen=True)
class Roofline:
    """Two measured limits of a device."""

    flops: float
    """Per second, of one large product."""
    bandwidth: float
    """Bytes per second, read and written, of one large copy."""

    def seconds(self, case: Case, element_size: int, training: bool) -> float:
        """The least time for a case: its arithmetic, or the bytes that must move whatever the algorithm.

        These are the weights of all experts and the tokens once in each direction, and the gradients of both in
        training; nothing in between.
        """
        weights = 3 * case.num_experts * case.dim * case.hidden_dim
        tokens = case.tokens * case.dim
        moved = (3 * weights + 5 * tokens if training else weights + 2 * tokens) * element_size
        return max((case.flops if training else case.forward_flops) / self.flops, moved / self.bandwidth)


def measure_roofline(clock: Clock, dtype: torch.dtype, device: str, size: int = 8192, rounds: int = 20) -> Roofline:
    """Time a square product and a copy of a GiB.

    Args:
        clock: the one that times contestants.
        dtype: of the product.
        device: where.
        size: of the square matrices.
        rounds: the median counts.
    """
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    source = torch.empty(size * size * 8, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    product = median(clock.seconds(lambda: torch.mm(a, b, out=out)) for _ in range(rounds))
    copy = median(clock.seconds(lambda: target.copy_(source)) for _ in range(rounds))
    return Roofline(2 * size**3 / product, 2 * source.nbytes / copy)


def peak_bytes(contestant: Contestant, device: str) -> int:
    """The most memory of a step above what was allocated before it, gradients included."""
    contestant.ready(training=True)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    contestant.step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    contestant.ready(training=True)
    return peak
