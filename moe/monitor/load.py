"""How evenly experts are used, measured without waiting for the device.

Every figure is a tensor; call ``.item()`` or ``LoadStats.floats()`` where a wait is in order, such as a logging
interval.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.errors import ConfigError
from moe.types import Routing

_COUNTS = ("tokens_per_expert", "dropped", "tokens", "top_score_sum")
_STEPS = 2.0**24
"""Steps of a whole: of what `LoadStats.to_counts` rounds scores to."""
_MOST_STEPS = 2.0**55
"""256 of it still fit int64."""


@final
@dataclass(frozen=True)
class LoadStats:
    """Counts of some forward calls of one layer, and what follows from them. Add two to pool their calls.

    Null experts, which compute nothing, are counted but leave nobody busy: load and all measures of balance are of the
    others, the real experts. E is their number, Z that of the null ones.

    Raises:
        ConfigError: ``num_null_experts`` leaves no real expert, or is negative.
    """

    tokens_per_expert: Int[Tensor, " E_plus_Z"]
    """int64; assignments that the router made, before any capacity."""
    dropped: Int[Tensor, ""]
    """int64; assignments to real experts that capacity dropped."""
    tokens: Int[Tensor, ""]
    """int64; tokens that count (padding does not)."""
    top_score_sum: Float[Tensor, ""]
    """float32; sum over these tokens of the best expert's score, which may be a null one."""
    num_null_experts: int = 0
    """Z; the last so many entries of ``tokens_per_expert`` are null experts."""

    def __post_init__(self) -> None:
        size = self.tokens_per_expert.numel()
        if not 0 <= self.num_null_experts < size:
            raise ConfigError(
                f"num_null_experts={self.num_null_experts} must be from 0 to {size - 1}, of {size} experts"
            )

    @classmethod
    def zero(cls, num_experts: int, device: torch.device, num_null_experts: int = 0) -> "LoadStats":
        """Of no call; ``num_experts`` includes the null ones."""
        count = torch.zeros((), dtype=torch.int64, device=device)
        return cls(count.repeat(num_experts), count, count, count.float(), num_null_experts)

    def __add__(self, other: "LoadStats") -> "LoadStats":
        sizes = [(stats.tokens_per_expert.numel(), stats.num_null_experts) for stats in (self, other)]
        if sizes[0] != sizes[1]:
            raise ConfigError(f"(experts, num_null_experts)={sizes[0]} and {sizes[1]} must be the same to be pooled")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _COUNTS})

    def to(self, device: torch.device) -> "LoadStats":
        """The same counts on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _COUNTS})

    @property
    def tokens_per_real_expert(self) -> Int[Tensor, " E"]:
        """int64; ``tokens_per_expert`` without the null experts."""
        return self.tokens_per_expert[: self.tokens_per_expert.numel() - self.num_null_experts]

    @property
    def load(self) -> Float[Tensor, " E"]:
        """Share of the real assignments, sums to 1 (0 everywhere before the first token)."""
        counts = self.tokens_per_real_expert
        return counts / counts.sum().clamp(min=1)

    @property
    def max_vio(self) -> Float[Tensor, ""]:
        """Largest load over the mean load, minus 1: 0 is even, E / K - 1 is all on K (arXiv 2408.15664, equation 4)."""
        return max_violation(self.tokens_per_real_expert)

    @property
    def max_vio_floor(self) -> Float[Tensor, ""]:
        """About the MaxVio that chance alone gives so many assignments, see `max_violation_floor`."""
        counts = self.tokens_per_real_expert
        total, size = counts.sum(), counts.numel()
        floor = (2 * math.log(size) * size / total.clamp(min=1)).sqrt()
        return torch.where(total > 0, floor, torch.zeros_like(floor))

    @property
    def coefficient_of_variation(self) -> Float[Tensor, ""]:
        """Standard deviation of the load over its mean."""
        load = self.load
        return load.std(correction=0) * load.numel()

    @property
    def entropy(self) -> Float[Tensor, ""]:
        """Entropy of the load over log E: 1 is even, log K / log E is all on K. 0 for a single expert."""
        load = self.load
        scale = math.log(load.numel()) if load.numel() > 1 else 1.0
        return torch.xlogy(load, load).sum().neg().clamp(min=0) / scale  # not -0

    @property
    def dead_experts(self) -> Int[Tensor, ""]:
        """How many real experts got nothing."""
        return (self.tokens_per_real_expert == 0).sum()

    @property
    def drop_rate(self) -> Float[Tensor, ""]:
        """Dropped assignments over all to real experts."""
        return self.dropped / self.tokens_per_real_expert.sum().clamp(min=1)

    @property
    def null_rate(self) -> Float[Tensor, ""]:
        """Assignments to null experts over all; 0 without null experts."""
        total = self.tokens_per_expert.sum()
        return (total - self.tokens_per_real_expert.sum()) / total.clamp(min=1)

    @property
    def confidence(self) -> Float[Tensor, ""]:
        """Mean score of a token's best expert."""
        return self.top_score_sum / self.tokens.clamp(min=1)

    def floats(self) -> dict[str, float]:
        """All figures but the load itself, as Python numbers; ``null_rate`` where there are null experts.

        Waits for the device once.
        """
        figures = {
            "max_vio": self.max_vio,
            "max_vio_floor": self.max_vio_floor,
            "cv": self.coefficient_of_variation,
            "entropy": self.entropy,
            "dead_experts": self.dead_experts,
            "drop_rate": self.drop_rate,
            "confidence": self.confidence,
        }
        if self.num_null_experts:
            figures["null_rate"] = self.null_rate
        return dict(zip(figures, torch.stack([figure.float() for figure in figures.values()]).tolist()))

    def to_counts(self) -> Int[Tensor, " C"]:
        """All counts in one tensor that may be summed over ranks: exact, whatever the order of the sum.

        ``top_score_sum`` goes in steps of 2^-24: scaled exactly, rounded to the nearest step. One that no sum can
        carry (not finite, or 2^31 and more) is counted instead, and `from_counts` makes the whole sum nan.

        Returns:
            ``(E + Z + 4,)`` int64: ``tokens_per_expert``, ``dropped``, ``tokens``, steps, sums that are not carried.
        """
        steps = self.top_score_sum * _STEPS
        carried = steps.abs() < _MOST_STEPS  # false for nan too
        steps = torch.where(carried, steps, torch.zeros_like(steps)).round().long()
        return torch.cat([self.tokens_per_expert, torch.stack([self.dropped, self.tokens, steps, (~carried).long()])])

    @classmethod
    def from_counts(cls, counts: Int[Tensor, " C"], num_null_experts: int = 0) -> "LoadStats":
        """The counts that `to_counts` gave, or a sum of several such tensors."""
        dropped, tokens, steps, lost = counts[-4:].unbind()
        top = steps.float() / _STEPS
        top = torch.where(lost > 0, torch.full_like(top, math.nan), top)
        return cls(counts[:-4], dropped, tokens, top, num_null_experts)

    def to_numbers(self) -> dict[str, Any]:
        """The counts as plain numbers and lists, for a checkpoint; waits for the device."""
        *counts, dropped, tokens = torch.cat([self.tokens_per_expert, self.dropped[None], self.tokens[None]]).tolist()
        return {
            "tokens_per_expert": counts,
            "dropped": dropped,
            "tokens": tokens,
            "top_score_sum": self.top_score_sum.item(),
            "num_null_experts": self.num_null_experts,
        }

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any], device: torch.device) -> "LoadStats":
        """The counts that `to_numbers` gave, on a device; those of before there were null experts have none."""
        dtypes = {"top_score_sum": torch.float32}
        counts = {
            name: torch.tensor(numbers[name], dtype=dtypes.get(name, torch.int64), device=device) for name in _COUNTS
        }
        return cls(**counts, num_null_experts=numbers.get("num_null_experts", 0))


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
    """The load of one decision.

    Args:
        chosen: as the router made it, null experts by name.
        kept: what the experts are handed: after capacity, null experts turned into -1.
    """
    counts, real = chosen.tokens_per_expert(), chosen.num_real_experts
    dropped = torch.zeros_like(counts[0])
    if kept is not chosen:
        dropped = counts[:real].sum() - kept.tokens_per_expert()[:real].sum()
    top = chosen.scores.amax(-1)
    if chosen.token_mask is None:
        tokens = torch.full_like(counts[0], len(top))
    else:
        tokens, top = chosen.token_mask.sum(), top.masked_fill(~chosen.token_mask, 0.0)
    return LoadStats(counts, dropped, tokens, top.sum().float(), chosen.num_null_experts)


def max_violation(tokens_per_expert: Int[Tensor, " E"]) -> Float[Tensor, ""]:
    """``max_e load_e / mean load - 1``; 0 where nothing was counted (arXiv 2408.15664, equation 4)."""
    total = tokens_per_expert.sum()
    violation = tokens_per_expert.max() * tokens_per_expert.numel() / total.clamp(min=1) - 1
    return torch.where(total > 0, violation, torch.zeros_like(violation))


def max_violation_floor(num_experts: int, tokens_per_expert: float) -> float:
    """About the MaxVio that a perfectly balanced router shows by chance: ``sqrt(2 ln E / n)``.

    That router draws each assignment anew, every expert with the same chance. A count then spreads by sqrt(n) around
    n, and the largest of E normal numbers lies about sqrt(2 ln E) deviations above their mean: a limit for many
    experts, from below. So the mean over such routers is less, by a factor that depends on E (the exact mean of the
    largest normal number): 0.48 for 2 experts, 0.70 for 8, 0.75 for 16, 0.81 for 64, 0.85 for 256. Two things move it:
    counts are skewed, so few assignments show more (256 experts: 0.85 for n from 1,024 on, 0.93 for 16, 1.14 for 1);
    and a token's K experts are distinct, so top-k shows less, by ``sqrt((1 - K/E) / (1 - 1/E))``.

    Args:
        num_experts: E.
        tokens_per_expert: n, the mean number of assignments an expert got.

    Source: Raab & Steger 1998, "Balls into Bins", theorem 1, for n far above (ln E)^3.
    """
    if num_experts < 2 or tokens_per_expert <= 0:
        return 0.0
    return math.sqrt(2 * math.log(num_experts) / tokens_per_expert)
