"""A dense feed-forward block: the shared expert of a MoE layer, and the feed-forward of a dense one."""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import Activation, option, require_positive_integer
from moe.experts.activation import activate
from moe.experts.operands import in_one_dtype
from moe.init import fan_in_normal_
from moe.kernels.experts import run_experts
from moe.kernels.plan import make_plan
from moe.kernels.route import route
from moe.kernels.route.logits import router_logits


@final
class FeedForward(nn.Module):
    """up, activation, down; the same arithmetic and the same initialisation as one routed expert.

    Args:
        dim: D, of input and output.
        hidden_dim: F, between the two products.
        activation: see ``moe.config.Activation``.
        bias: add a bias to both products.
        gate: multiply each token's output by a learnt sigmoid of the token (Qwen1.5-MoE's shared-expert gate).
        batch_invariant: a token's output does not depend, in any bit, on what else is in its batch. Computed as the one
            expert of the routed experts' operation, since PyTorch's products promise no such thing on any device: the
            linear layers' own forward and hooks do not run then.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        gate: bool = False,
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_integer(dim=dim, hidden_dim=hidden_dim)
        self.activation = option(Activation, "activation", activation)
        self.batch_invariant = batch_invariant
        up_dim = hidden_dim * (2 if self.activation.is_gated else 1)
        self.up = nn.Linear(dim, up_dim, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(hidden_dim, dim, bias=bias, device=device, dtype=dtype)
        self.gate = nn.Linear(dim, 1, bias=False, device=device, dtype=dtype) if gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of deviation sqrt(0.1 / fan_in) (see ``moe.init``), biases 0."""
        for linear in (self.up, self.down, self.gate):
            if linear is not None:
                fan_in_normal_(linear.weight, linear.in_features)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Every token through the block."""
        if self.batch_invariant:
            return self._run_alone(x.reshape(-1, x.shape[-1])).view(x.shape)
        y: Tensor = self.down(activate(self.up(x), self.activation))
        return y if self.gate is None else F.sigmoid(self.gate(x)) * y

    def _run_alone(self, tokens: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Each token as if it were the only one."""
        linears = (self.up.weight, self.down.weight, self.up.bias, self.down.bias)
        tokens, *parameters = in_one_dtype(tokens, *linears)
        if self.gate is None:
            weights = tokens.new_ones(tokens.shape[0], 1, dtype=torch.promote_types(tokens.dtype, torch.float32))
            expert_ids = torch.zeros_like(weights, dtype=torch.int32)
        else:
            logits = router_logits(tokens, self.gate.weight, batch_invariant=True)
            expert_ids, weights, _ = route(logits, 1, score_function="sigmoid")
        plan = make_plan(expert_ids, 1)
        one_expert: list[Any] = [None if each is None else each.unsqueeze(0) for each in parameters]
        return run_experts(tokens, weights, plan, *one_expert, activation=self.activation, batch_invariant=True)
