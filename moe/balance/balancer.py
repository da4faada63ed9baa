"""What balances one layer: its losses and its bias rule, with the state that they keep between steps.

The losses of a call are computed in two parts, since those over a whole step need what other calls and other devices
counted. In the forward pass `Balancer.parts` makes a vector: first the sum of all losses that concern the call alone,
then, where a loss is over the step, each expert's probability summed over the call's tokens. `Balancer.total` makes a
scalar of such vectors when the loss is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.balance.calls import PendingLoss
from moe.balance.observed import MarginCounter, TokenSample, every
from moe.balance.shares import Scope, ShareLoss, probability_sum
from moe.balance.step_counts import StepCounts
from moe.balance.terms import Terms
from moe.buffers import Float32Buffers
from moe.types import Routing


@final
@dataclass(frozen=True)
class StepLoad:
    """What a loss over a whole step needs to know of it."""

    tokens_per_expert: Int[Tensor, " E"]
    """int64; of the step as far as it is known, over all devices."""
    tokens: Int[Tensor, ""]
    """int64; those whose probabilities are in the mean."""
    parts: float
    """Into so many parts the mean over these tokens is split, which the caller averages again: devices with other data,
    times losses of one step."""


@final
class Balancer(Float32Buffers):
    """The losses and the bias rule of a layer.

    Args:
        terms: what a user asked for.
        num_experts: E, null experts included.
        num_null_experts: how many of them are null.
        top_k: K.
        device: of the state.

    Raises:
        ConfigError: a term does not fit these sizes.
    """

    bias_state: Tensor | None
    steps: Tensor | None

    def __init__(
        self,
        terms: Terms,
        num_experts: int,
        num_null_experts: int,
        top_k: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for term in terms.all:
            if hasattr(term, "check"):
                term.check(num_experts, num_null_experts, top_k)
        self.terms, self.num_experts, self.top_k = terms, num_experts, top_k
        self.step_losses = [loss for loss in terms.losses if isinstance(loss, ShareLoss) and loss.scope == Scope.GLOBAL]
        self.call_losses = [loss for loss in terms.losses if loss not in self.step_losses]
        rows = terms.bias_rule.state_rows if terms.bias_rule else 0
        self.register_buffer("bias_state", torch.zeros(rows, num_experts, device=device) if rows else None)
        for name, loss in terms.adaptive.items():
            self.register_buffer(f"{name}_state", torch.empty(loss.initial_state().shape, device=device))
        counts_steps = terms.bias_rule is not None and terms.bias_rule.margins_at(0) is not None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device) if counts_steps else None)
        self.reset_parameters()
        self.margins, self.sample = MarginCounter(num_experts), TokenSample()
        self.planned: StepLoad | None = None
        """Known ahead of the step, see ``moe.count_ahead``."""
        self._so_far: Tensor | None = None

    def reset_parameters(self) -> None:
        """Set the state to that before the first step."""
        if self.bias_state is not None:
            self.bias_state.zero_()
        for name, loss in self.terms.adaptive.items():
            state = self._state(name)
            state.copy_(loss.initial_state())
        if self.steps is not None:
            self.steps.zero_()
        self._count_steps(0)

    def _count_steps(self, steps: int) -> None:
        """Know on the host how many steps there were, so that nothing has to ask the device."""
        rule = self.terms.bias_rule
        self.step_number = steps
        self.request = None if rule is None else rule.margins_at(steps)
        """Which margins of this step the bias rule wants."""

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """Load as any module does; waits for the device where the rule counts steps."""
        super()._load_from_state_dict(*args, **options)
        self.read_steps()

    def read_steps(self) -> None:
        """Count on from what the buffer says, after it was written to; waits for the device."""
        if self.steps is not None and not self.steps.is_meta:
            self._count_steps(int(self.steps))

    def parts(self, routing: Routing, weight: Float[Tensor, "E D"]) -> Float[Tensor, " P"] | None:
        """What the losses of one call are made of, ``(1,)`` or ``(1 + E,)``; None without losses.

        Args:
            routing: the router's decision.
            weight: the router's.
        """
        values = [loss.coefficient * loss(routing) for loss in self.call_losses]
        values += [loss.coefficient * loss.of_weight(weight) for loss in self.terms.weight_losses]
        values += [loss(routing, self._state(name)) for name, loss in self.terms.adaptive.items()]
        if not (values or self.step_losses):
            return None
        dtype = routing.scores.dtype
        alone = torch.stack([value.to(dtype) for value in values]).sum() if values else routing.scores.new_zeros(())
        return torch.cat([alone[None], probability_sum(routing)]) if self.step_losses else alone[None]

    def total(
        self, collected: Sequence[tuple[Float[Tensor, " P"], PendingLoss]], load: StepLoad | None
    ) -> Float[Tensor, ""]:
        """The loss of some calls: the mean over their tokens, and the losses over the step.

        Args:
            collected: what `parts` made of each call.
            load: of the step; None where no loss is over it.
        """
        parts = torch.stack([values for values, _ in collected])
        weights = torch.stack([pending.num_tokens for _, pending in collected]).to(parts.dtype)
        loss = (parts[:, 0] * weights).sum() / weights.sum().clamp(min=1)
        if load is None:
            return loss
        probability = parts[:, 1:].sum(0) * load.parts / load.tokens.clamp(min=1)
        counts = load.tokens_per_expert
        shares = counts.to(parts.dtype) / counts.sum().clamp(min=1)
        found = torch.stack([each.coefficient * each.combine(shares, probability) for each in self.step_losses]).sum()
        return loss + found * (counts.sum() > 0)

    def add(self, counts: Int[Tensor, " C"]) -> Int[Tensor, " C"]:
        """Counts of the step so far, these included."""
        self._so_far = counts if self._so_far is None else self._so_far + counts
        return self._so_far

    @torch.no_grad()
    def observe(self, routing: Routing, tokens: Float[Tensor, "T D"], score_bias: Float[Tensor, " E"] | None) -> None:
        """Note what the bias rule needs beside the load of experts, of one call in training mode."""
        if self.request is None or score_bias is None:
            return
        if self.request.ahead:
            self.sample.keep(tokens, routing.token_mask, self.request.tokens)
        else:
            self.margins.count(every(routing, self.request.tokens), score_bias)

    @torch.no_grad()
    def step(self, score_bias: Float[Tensor, " E"] | None, counts: StepCounts) -> None:
        """Move the bias and what else adapts, in place, after a step."""
        rule = self.terms.bias_rule
        if rule is not None and score_bias is not None:
            state = self.bias_state if self.bias_state is not None else score_bias.new_empty(0, self.num_experts)
            bias, state = rule.updated(score_bias, state, counts)
            score_bias.copy_(bias)
            if self.bias_state is not None:
                self.bias_state.copy_(state)
            if self.steps is not None:
                self.steps += 1
                self._count_steps(self.step_number + 1)
        for name, loss in self.terms.adaptive.items():
            state = self._state(name)
            state.copy_(loss.updated(state, counts))

    def end_step(self) -> None:
        """Forget what was known of the step that has ended."""
        self._so_far = self.planned = None

    def _state(self, name: str) -> Tensor:
        state: Tensor = getattr(self, f"{name}_state")
        return state

    def extra_repr(self) -> str:
        """The terms in the module's printed form."""
        return ", ".join(repr(term) for term in self.terms.all)
