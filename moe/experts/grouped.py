"""The routed experts: all of them in two grouped products.

Sizes: T tokens, D dim, E experts, F hidden_dim, U = 2F where gated else F, K experts per token, N = T * K rows.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.config import Activation, option, require_positive_integer
from moe.errors import DtypeError
from moe.experts.activation import activate
from moe.init import fan_in_normal_
from moe.kernels.combine import combine_rows
from moe.kernels.gather import gather_rows
from moe.kernels.grouped_mm import grouped_mm
from moe.kernels.plan import make_plan
from moe.types import Routing


@final
class GroupedExperts(nn.Module):
    """E feed-forward blocks as stacked parameters, and the one operation that runs them.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        activation: see ``moe.config.Activation``.
        bias: add a bias to both products.

    Weights:
        ``up_weight (E, U, D)``, the gate's F rows first; ``down_weight (E, D, F)``; with ``bias`` also ``up_bias (E,
        U)`` and ``down_bias (E, D)``. Weights start as a truncated normal of deviation sqrt(0.1 / fan_in), where
        fan_in is that of one expert (D, then F); biases start at 0. See ``moe.init`` for the source.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_integer(num_experts=num_experts, dim=dim, hidden_dim=hidden_dim)
        self.activation = option(Activation, "activation", activation)
        up_dim = hidden_dim * (2 if self.activation.is_gated else 1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.up_weight = parameter(up_dim, dim)
        self.down_weight = parameter(dim, hidden_dim)
        self.up_bias = parameter(up_dim) if bias else None
        self.down_bias = parameter(dim) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew and set biases to zero."""
        for weight in (self.up_weight, self.down_weight):
            fan_in_normal_(weight, weight.shape[-1])
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Sum over each token's experts of weight * expert(token); 0 for a token without one.

        Args:
            x: tokens, of the parameters' dtype; under autocast all of it runs in the autocast dtype.
            routing: ids of these experts; only ``expert_ids`` and ``weights`` are used.

        Raises:
            DtypeError: tokens and parameters differ in dtype outside autocast.
        """
        x, up_weight, down_weight, up_bias, down_bias = self._in_one_dtype(x)
        plan = make_plan(routing.expert_ids, up_weight.shape[0])
        rows = gather_rows(x, plan)
        up = _project(rows, up_weight, up_bias, plan.expert_offsets)
        down = _project(activate(up, self.activation), down_weight, down_bias, plan.expert_offsets)
        return combine_rows(down, routing.weights, plan)

    def _in_one_dtype(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The tokens and the parameters, cast where autocast asks for it."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(device)
        elif x.dtype == self.up_weight.dtype:
            dtype = x.dtype
        else:
            raise DtypeError(
                f"x is {x.dtype} but the experts' weights are {self.up_weight.dtype}; "
                "convert one of them, or use autocast"
            )
        up_bias = None if self.up_bias is None else self.up_bias.to(dtype)
        down_bias = None if self.down_bias is None else self.down_bias.to(dtype)
        return x.to(dtype), self.up_weight.to(dtype), self.down_weight.to(dtype), up_bias, down_bias


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """Each row times its expert's matrix, plus its expert's bias; ``(N, in)`` to ``(N, out)``."""
    out = grouped_mm(rows, weight, expert_offsets)
    if bias is None:
        return out
    # A bias is a weight on an input of 1. So written, its gradient is a grouped product too: a sum in fixed order,
    # where indexing the bias by row would sum with atomics on a GPU.
    return out + grouped_mm(torch.ones_like(rows[:, :1]), bias.unsqueeze(-1), expert_offsets)
