"""Losses that even out devices rather than experts, where device d holds the d-th group of consecutive experts.

Notation as in `moe.balance.shares`, with D devices of E / D experts each.
"""

from dataclasses import dataclass, field
from typing import final

from jaxtyping import Float
from torch import Tensor

from moe.balance.shares import Scope, ShareLoss, mean_over_sequences, mean_over_tokens, mean_probability
from moe.config import option, require_positive, require_positive_integer
from moe.errors import ConfigError
from moe.types import Routing


@final
@dataclass(frozen=True)
class DeviceBalance(ShareLoss):
    """``D * sum_d f'_d P'_d``, with shares of devices: the sums of ``f_e`` and ``P_e`` over a device's experts.

    1 at balance, whatever E, K and D; at most D. Experts may be as uneven as they like within a device.

    Args:
        coefficient: factor on the loss.
        scope: see `moe.balance.Scope`.
        num_devices: D, a divisor of E.

    Raises:
        ConfigError: a coefficient or num_devices that is not positive, an unknown scope; num_devices does not divide
            the experts, or some of these are null.

    Source: DeepSeek-V2 (arXiv 2405.04434, equations 26-28; its f'_d is D times the share), with its factor.
    """

    coefficient: float = 0.05
    num_devices: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_integer(num_devices=self.num_devices)

    def check(self, num_experts: int, num_null_experts: int, top_k: int) -> None:  # noqa: ARG002
        """Raise a ConfigError unless the devices share a layer's experts evenly."""
        _check_devices(self.num_devices, num_experts, num_null_experts)

    def combine(
        self, load: Float[Tensor, "*parts E"], probability: Float[Tensor, "*parts E"]
    ) -> Float[Tensor, "*parts"]:
        """The loss of given shares, without its coefficient."""
        D = self.num_devices
        return D * (_sum_of_devices(load, D) * _sum_of_devices(probability, D)).sum(-1)


@final
@dataclass(frozen=True)
class CommunicationBalance:
    """``sum_d f''_d P'_d``: evens out how many tokens are sent to each device.

    ``f''_d = D / (M T) * (tokens sent to d)``, a token once however many of its experts are there, and ``P'_d`` the sum
    of ``P_e`` over the device's experts. 1 where every token goes to M devices and each device gets as many; less where
    tokens go to fewer. E and K do not change its scale.

    Args:
        coefficient: factor on the loss.
        scope: "call" or "sequence", see `moe.balance.Scope`.
        num_devices: D, a divisor of E.
        top_devices: M, to how many devices a token goes at most (``top_groups`` of a router with as many groups as
            there are devices).

    Raises:
        ConfigError: a coefficient or num_devices that is not positive, top_devices outside 1 .. num_devices, a scope
            that is neither of the two; num_devices does not divide the experts, or some of these are null.

    Source: DeepSeek-V2 (arXiv 2405.04434, equations 29-31), with its factor.
    """

    coefficient: float = 0.02
    scope: str = Scope.CALL
    num_devices: int = field(kw_only=True)
    top_devices: int = field(kw_only=True)

    def __post_init__(self) -> None:
        require_positive(coefficient=self.coefficient)
        require_positive_integer(num_devices=self.num_devices, top_devices=self.top_devices)
        if self.top_devices > self.num_devices:
            raise ConfigError(f"top_devices={self.top_devices} must be between 1 and num_devices={self.num_devices}")
        object.__setattr__(self, "scope", option(Scope, "scope", self.scope))
        if self.scope == Scope.GLOBAL:
            raise ConfigError(
                f"scope={str(self.scope)!r} must be one of call, sequence: where tokens are sent is counted for each "
                "call"
            )

    def check(self, num_experts: int, num_null_experts: int, top_k: int) -> None:  # noqa: ARG002
        """Raise a ConfigError unless the devices share a layer's experts evenly."""
        _check_devices(self.num_devices, num_experts, num_null_experts)

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The loss without its coefficient; 0 where no token counts."""
        D, by_sequence = self.num_devices, self.scope == Scope.SEQUENCE
        probability = _sum_of_devices(mean_probability(routing, by_sequence=by_sequence), D)
        # -1, no expert, is rounded down to no device; the first column takes these in.
        device = routing.expert_ids.long() // (routing.num_experts // D)
        sent = probability.new_zeros(len(device), D + 1).scatter(1, device + 1, 1.0)[:, 1:]
        share = mean_over_tokens(sent, routing, by_sequence=by_sequence)
        values = D / self.top_devices * (share * probability).sum(-1)
        return mean_over_sequences(values, routing) if by_sequence else values


def _sum_of_devices(shares: Tensor, num_devices: int) -> Tensor:
    """``(..., E)`` to ``(..., D)``."""
    _check_devices(num_devices, shares.shape[-1], 0)
    return shares.unflatten(-1, (num_devices, -1)).sum(-1)


def _check_devices(num_devices: int, num_experts: int, num_null_experts: int) -> None:
    if num_null_experts:
        raise ConfigError(f"num_devices={num_devices} beside null experts, which are on no device; leave one of both")
    if num_experts % num_devices:
        raise ConfigError(f"num_devices={num_devices} must divide num_experts={num_experts}")
