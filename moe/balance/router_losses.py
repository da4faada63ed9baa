"""Losses on the router itself, its logits or its weight. None of them looks at the load.

Sizes: T tokens that count, E experts, D dim.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moe.balance.shares import mean_over_tokens
from moe.config import require_positive
from moe.types import Routing


@final
@dataclass(frozen=True)
class RouterZLoss:
    """``mean_t (log sum_e exp logit_te)^2``: keeps logits small; it does not balance.

    Source: ST-MoE (Zoph et al. 2022, arXiv 2202.08906, equation 5), with its coefficient.
    """

    coefficient: float = 1e-3

    def __post_init__(self) -> None:
        require_positive(coefficient=self.coefficient)

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The loss without its coefficient."""
        return mean_over_tokens(routing.logits.logsumexp(-1).square(), routing)


@final
@dataclass(frozen=True)
class RouterOrthogonality:
    """``sum_ij (w_i . w_j / (|w_i| |w_j|) - delta_ij)^2`` over the rows of the router's weight: keeps experts apart.

    0 where all rows are orthogonal, whatever their lengths. With E > D they cannot be, and it is at least
    ``E^2 / D - E``. It grows as E^2: about ``E^2 / D`` for random rows, for which a coefficient has to make up.

    Source: the router orthogonalization loss of the ERNIE 4.5 Technical Report (Baidu 2025); the default coefficient is
    ours.
    """

    coefficient: float = 1e-3

    def __post_init__(self) -> None:
        require_positive(coefficient=self.coefficient)

    def of_weight(self, weight: Float[Tensor, "E D"]) -> Float[Tensor, ""]:
        """The loss without its coefficient, in float32 or better."""
        return _from_identity(torch.nn.functional.normalize(_wide(weight), dim=-1)).square().sum()


@final
@dataclass(frozen=True)
class RouterSimilarity:
    """``sum_ij |w_i . w_j - delta_ij|`` over the rows of the router's weight: similar tokens get similar scores.

    0 where the rows are orthogonal and of length 1: the logits then keep the angles between tokens, as far as E
    directions can. With E > D it cannot be 0. Its off-diagonal part grows as E^2. Unlike `RouterOrthogonality` it holds
    the rows' lengths to 1, ten times the squared length that this library's routers start from.

    Source: SimBal (Omi et al. 2025, arXiv 2506.14038), the L1 norm taken over the entries; the default coefficient is
    ours.
    """

    coefficient: float = 1e-3

    def __post_init__(self) -> None:
        require_positive(coefficient=self.coefficient)

    def of_weight(self, weight: Float[Tensor, "E D"]) -> Float[Tensor, ""]:
        """The loss without its coefficient, in float32 or better."""
        return _from_identity(_wide(weight)).abs().sum()


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _from_identity(rows: Tensor) -> Tensor:
    """What the products of all pairs of rows differ by from the identity; float32 under autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
