"""How evenly experts are used, measured without waiting for the device.

Every figure is a tensor; call ``.item()`` or ``LoadStats.floats()`` where a wait is in order, such as a logging
interval.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.types import Routing


@final
@dataclass(frozen=True)
class LoadStats:
    """Counts of some forward calls of one layer, and what follows from them. Add two to pool their calls."""

    tokens_per_expert: Int[Tensor, " E"]
    """int64; assignments that the router made, before any capacity."""
    dropped: Int[Tensor, ""]
    """int64; assignments that capacity dropped."""
    tokens: Int[Tensor, ""]
    """int64; tokens that count (padding does not)."""
    top_score_sum: Float[Tensor, ""]
    """float32; sum over these tokens of the best expert's score."""

    @classmethod
    def zero(cls, num_experts: int, device: torch.device) -> "LoadStats":
        """Of no call."""
        count = torch.zeros((), dtype=torch.int64, device=device)
        return cls(count.repeat(num_experts), count, count, count.float())

    def __add__(self, other: "LoadStats") -> "LoadStats":
        return LoadStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def to(self, device: torch.device) -> "LoadStats":
        """The same counts on a device."""
        return LoadStats(*(getattr(self, f.name).to(device) for f in fields(self)))

    @property
    def load(self) -> Float[Tensor, " E"]:
        """Share of the assignments, sums to 1 (0 everywhere before the first token)."""
        return self.tokens_per_expert / self.tokens_per_expert.sum().clamp(min=1)

    @property
    def max_vio(self) -> Float[Tensor, ""]:
        """Largest load over the mean load, minus 1: 0 is even, E / K - 1 is all on K (arXiv 2408.15664, equation 4)."""
        return max_violation(self.tokens_per_expert)

    @property
    def coefficient_of_variation(self) -> Float[Tensor, ""]:
        """Standard deviation of the load over its mean."""
        return self.load.std(correction=0) * self.tokens_per_expert.numel()

    @property
    def entropy(self) -> Float[Tensor, ""]:
        """Entropy of the load over log E: 1 is even, log K / log E is all on K."""
        load = self.load
        scale = math.log(load.numel()) if load.numel() > 1 else 1.0
        return -torch.xlogy(load, load).sum() / scale

    @property
    def dead_experts(self) -> Int[Tensor, ""]:
        """How many experts got nothing."""
        return (self.tokens_per_expert == 0).sum()

    @property
    def drop_rate(self) -> Float[Tensor, ""]:
        """Dropped assignments over all."""
        return self.dropped / self.tokens_per_expert.sum().clamp(min=1)

    @property
    def confidence(self) -> Float[Tensor, ""]:
        """Mean score of a token's best expert."""
        return self.top_score_sum / self.tokens.clamp(min=1)

    def floats(self) -> dict[str, float]:
        """All figures but the load itself, as Python numbers; waits for the device once."""
        figures = {
            "max_vio": self.max_vio,
            "cv": self.coefficient_of_variation,
            "entropy": self.entropy,
            "dead_experts": self.dead_experts,
            "drop_rate": self.drop_rate,
            "confidence": self.confidence,
        }
        return dict(zip(figures, torch.stack([figure.float() for figure in figures.values()]).tolist()))

    def to_numbers(self) -> dict[str, Any]:
        """The counts as plain numbers and lists, for a checkpoint; waits for the device."""
        *counts, dropped, tokens = torch.cat([self.tokens_per_expert, self.dropped[None], self.tokens[None]]).tolist()
        return {
            "tokens_per_expert": counts,
            "dropped": dropped,
            "tokens": tokens,
            "top_score_sum": self.top_score_sum.item(),
        }

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any], device: torch.device) -> "LoadStats":
        """The counts that `to_numbers` gave, on a device."""
        dtypes = {"top_score_sum": torch.float32}
        return cls(
            **{name: torch.tensor(n, dtype=dtypes.get(name, torch.int64), device=device) for name, n in numbers.items()}
        )


@final
class LoadCounter:
    """Adds up the decisions of one layer. No module and no buffer: a ``.to(bfloat16)`` must not touch a count."""

    def __init__(self) -> None:
        self._stats: LoadStats | None = None

    def count(self, chosen: Routing, kept: Routing) -> None:
        """Add one call.

        Args:
            chosen: the router's decision.
            kept: the same after capacity.
        """
        stats = count_load(chosen, kept)
        self._stats = stats if self._stats is None else self._stats.to(stats.tokens.device) + stats

    def take(self) -> LoadStats | None:
        """What was counted since the last time, None if nothing; starts again from zero."""
        stats, self._stats = self._stats, None
        return stats

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoadCounter":
        """A copied layer has counted nothing yet."""
        return LoadCounter()

    def __reduce__(self) -> tuple[type["LoadCounter"], tuple[()]]:
        """An unpickled layer has counted nothing yet."""
        return LoadCounter, ()


@torch.no_grad()
def count_load(chosen: Routing, kept: Routing) -> LoadStats:
    """The load of one decision."""
    counts = chosen.tokens_per_expert()
    dropped = torch.zeros_like(counts[0]) if kept is chosen else counts.sum() - kept.tokens_per_expert().sum()
    top = chosen.scores.amax(-1)
    if chosen.token_mask is None:
        tokens = torch.full_like(counts[0], len(top))
    else:
        tokens, top = chosen.token_mask.sum(), top.masked_fill(~chosen.token_mask, 0.0)
    return LoadStats(counts, dropped, tokens, top.sum().float())


def max_violation(tokens_per_expert: Int[Tensor, " E"]) -> Float[Tensor, ""]:
    """``max_e load_e / mean load - 1``; 0 where nothing was counted (arXiv 2408.15664, equation 4)."""
    total = tokens_per_expert.sum()
    violation = tokens_per_expert.max() * tokens_per_expert.numel() / total.clamp(min=1) - 1
    return torch.where(total > 0, violation, torch.zeros_like(violation))


def max_violation_floor(num_experts: int, tokens_per_expert: float) -> float:
    """About the MaxVio that a perfectly balanced random router shows by chance: ``sqrt(2 ln E / n)``.

    The mean of it over such routers is 0.7 to 0.9 of this for E of 16 to 64: what is below tells nothing.

    Args:
        num_experts: E.
        tokens_per_expert: n, the mean number of assignments an expert got.
    """
    if num_experts < 2 or tokens_per_expert <= 0:
        return 0.0
    return math.sqrt(2 * math.log(num_experts) / tokens_per_expert)
