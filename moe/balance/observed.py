"""What some bias rules need of a step beside its counts. No buffers: they are of one step and of one device."""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.kernels.margins import BINS, count_margins
from moe.types import Routing


@final
class MarginCounter:
    """Adds up the margins of decisions; see `moe.kernels.margins`."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._counts: Tensor | None = None

    def count(self, routing: Routing, score_bias: Float[Tensor, " E"]) -> None:
        """Add one call, or some tokens of it."""
        counts = count_margins(routing.scores, routing.expert_ids, score_bias, routing.token_mask)
        self._counts = counts if self._counts is None else self._counts + counts

    def take(self, device: torch.device) -> Int[Tensor, "E bins"]:
        """What was counted since the last time, on a device; starts again from zero."""
        counts, self._counts = self._counts, None
        if counts is None:
            return torch.zeros(self.num_experts, BINS, dtype=torch.int32, device=device)
        return counts.to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MarginCounter":
        """A copied layer has counted nothing yet."""
        return MarginCounter(self.num_experts)

    def __reduce__(self) -> tuple[type["MarginCounter"], tuple[int]]:
        """An unpickled layer has counted nothing yet."""
        return MarginCounter, (self.num_experts,)


@final
@dataclass(frozen=True)
class _Kept:
    tokens: Float[Tensor, "T D"]
    mask: Bool[Tensor, " T"] | None
    previous: "_Kept | None"
    """A chain and not a list, whose length a compiled layer would be compiled for."""


@final
class TokenSample:
    """Some of the tokens that a router has seen in a step, without gradients."""

    def __init__(self) -> None:
        self._last: _Kept | None = None

    def keep(self, tokens: Float[Tensor, "T D"], mask: Bool[Tensor, " T"] | None, size: int | None) -> None:
        """Keep at most ``size`` tokens of a call, evenly spaced over it; None for all."""
        part = None if mask is None else every_row(mask, size)
        self._last = _Kept(every_row(tokens.detach(), size), part, self._last)

    def take(self) -> list[tuple[Float[Tensor, "T D"], Bool[Tensor, " T"] | None]]:
        """What was kept since the last time, call by call, the last one first."""
        found, kept = [], self._last
        self._last = None
        while kept is not None:
            found.append((kept.tokens, kept.mask))
            kept = kept.previous
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenSample":
        """A copied layer has seen nothing yet."""
        return TokenSample()

    def __reduce__(self) -> tuple[type["TokenSample"], tuple[()]]:
        """An unpickled layer has seen nothing yet."""
        return TokenSample, ()


def every(routing: Routing, size: int | None) -> Routing:
    """The decision on at most ``size`` tokens, evenly spaced, without gradients; itself for None."""
    mask = routing.token_mask
    if size is None or len(routing.scores) <= size:
        return routing
    return Routing(
        expert_ids=every_row(routing.expert_ids, size),
        weights=every_row(routing.weights.detach(), size),
        scores=every_row(routing.scores.detach(), size),
        logits=every_row(routing.logits.detach(), size),
        token_mask=None if mask is None else every_row(mask, size),
    )


def every_row(rows: Tensor, size: int | None) -> Tensor:
    """At most ``size`` rows, evenly spaced and copied, as a view would keep all of them; ``rows`` itself for None."""
    stride = 1 if size is None else -(-max(len(rows), 1) // size)
    return rows if stride == 1 else rows[::stride].clone()
