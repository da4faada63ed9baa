"""The routed experts: all of them in one operation.

Sizes: T tokens, D dim, E experts, F hidden_dim, U = 2F where gated else F, K experts per token, N = T * K rows.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.config import Activation, Recompute, option, require_positive_integer
from moe.errors import ConfigError
from moe.experts.operands import in_one_dtype
from moe.init import fan_in_normal_
from moe.kernels.experts import run_experts
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
        recompute: see ``moe.config.Recompute``.
        weight_grad_dtype: of the parameters' gradients, where it is not that of the parameters: float32 sums up
            micro-batches of a bfloat16 model without rounding each. It becomes the parameters' ``grad_dtype``. On a CPU
            the products of these gradients then run in float32.
        batch_invariant: a token's output does not depend, in any bit, on what else is in its batch. On a GPU it never
            does; on the CPU this has a price.

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
        recompute: str = "none",
        weight_grad_dtype: torch.dtype | None = None,
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_integer(num_experts=num_experts, dim=dim, hidden_dim=hidden_dim)
        self.activation = option(Activation, "activation", activation)
        self.recompute = option(Recompute, "recompute", recompute)
        if weight_grad_dtype is not None and not weight_grad_dtype.is_floating_point:
            raise ConfigError(f"weight_grad_dtype={weight_grad_dtype} must be floating point")
        self.weight_grad_dtype, self.batch_invariant = weight_grad_dtype, batch_invariant
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
            ConfigError: under ``torch.compile`` with a ``weight_grad_dtype`` that is not the parameters' dtype: the
                compiler rounds gradients to the latter.
            DtypeError: tokens and parameters differ in dtype outside autocast.
        """
        self._ask_for_grad_dtype()
        x, *parameters = in_one_dtype(x, self.up_weight, self.down_weight, self.up_bias, self.down_bias)
        return run_experts(
            x,
            routing.weights,
            make_plan(routing.expert_ids, self.up_weight.shape[0]),
            *parameters,
            activation=self.activation,
            recompute_up=self.recompute is Recompute.UP,
            weight_grad_dtype=self.weight_grad_dtype if x.dtype == self.up_weight.dtype else None,
            batch_invariant=self.batch_invariant,
        )

    def _ask_for_grad_dtype(self) -> None:
        """Set the parameters' ``grad_dtype``; in each call, since a copied or loaded parameter has lost it."""
        dtype = self.weight_grad_dtype
        if dtype is None or dtype == self.up_weight.dtype:
            return
        if torch.compiler.is_compiling():
            raise ConfigError(f"weight_grad_dtype={dtype} for parameters of {self.up_weight.dtype} cannot be compiled")
        for parameter in self.parameters():
            if parameter.is_leaf and parameter.grad_dtype != dtype:
                parameter.grad_dtype = dtype
