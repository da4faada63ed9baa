"""The layer: router, balance, dispatch and experts put together.

Sizes: T tokens, D dim, E experts, F hidden_dim, K experts per token.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, final

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from moe.balance import (
    Balancer,
    BalanceSpec,
    Call,
    CallLog,
    attach,
    count_tokens,
    in_backward,
    make_balance,
    read_call,
    write_call,
)
from moe.config import DropPolicy, NullOutput, make, option, require_positive, require_positive_integer, require_top_k
from moe.dispatch import Dispatcher, LocalDispatcher
from moe.errors import ConfigError, DtypeError, ShapeError
from moe.experts import FeedForward, GroupedExperts
from moe.layer.defaults import default_balance
from moe.layer.script import Observers, Script
from moe.monitor import LoadCounter
from moe.routing import ROUTERS, Router, limit_capacity, null_weight, without_null
from moe.types import Routing


class PoolCounts(Protocol):
    """Adds up counts of several layers over all devices that see other tokens."""

    @property
    def ranks(self) -> int:
        """How many devices that are."""
        ...

    def __call__(self, counts: Sequence[Int[Tensor, "..."]]) -> list[Tensor]:
        """The sums of int64 tensors, in the same order; every device calls it with the same layers."""
        ...


@final
class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward layer: ``[..., dim]`` in, the same shape out.

    >>> layer = MoE(dim=64, hidden_dim=128, num_experts=8, top_k=2)
    >>> layer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])

    Add ``balance_loss(model)`` to the training loss and call ``balance_step(model)`` after each optimizer step. A
    forward call in training mode counts towards both; call ``model.eval()`` for validation.

    Args:
        dim: D, width of the tokens.
        hidden_dim: F, width of one expert.
        num_experts: E.
        top_k: K, experts per token.
        router: a name of ``moe.routing.ROUTERS``, a mapping ``{"name": ..., option: ...}``, or a ``Router`` of one's
            own.
        activation: of routed and shared experts, see ``moe.config.Activation``.
        bias: experts' products have a bias.
        shared_hidden_dim: width of a shared expert that every token goes through (DeepSeekMoE, arXiv 2401.06066,
            section 3.2); several shared experts of width F are one of width n * F. 0 for none.
        shared_gate: the shared expert's output is multiplied by a learnt sigmoid of the token.
        capacity_factor: None is dropless. A number gives every expert room for ``ceil(capacity_factor * T * K / E)``
            assignments and drops the rest; null experts count towards E there.
        drop_policy: what is dropped, see ``moe.config.DropPolicy``.
        recompute: "none", or "up": the routed experts keep only their input and the routing for backward, see
            ``moe.config.Recompute``.
        weight_grad_dtype: of the routed experts' gradients; ``torch.float32`` sums up the micro-batches of a bfloat16
            model without rounding each. Not under ``torch.compile``. None for the dtype of the parameters.
        batch_invariant: a token's output does not depend, in any bit, on what else is in its batch (with a capacity it
            does, on what is dropped). See docs/explanation/determinism.md for what it costs.
        balance: losses and at most one bias rule, as objects or as a mapping of names to options, see
            ``moe.balance.make_balance``. ``()`` for none; None for what suits the router, ``lookahead_bias`` for most,
            see ``moe.layer.default_balance``.

    Raises:
        ConfigError: an option has a value it cannot have.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        router: str | Mapping[str, Any] | Router = "softmax",
        activation: str = "swiglu",
        bias: bool = False,
        shared_hidden_dim: int = 0,
        shared_gate: bool = False,
        capacity_factor: float | None = None,
        drop_policy: str = "probability",
        recompute: str = "none",
        weight_grad_dtype: torch.dtype | None = None,
        batch_invariant: bool = False,
        balance: BalanceSpec | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_integer(dim=dim, hidden_dim=hidden_dim)
        require_top_k(top_k, num_experts)
        if capacity_factor is not None:
            require_positive(capacity_factor=capacity_factor)
        if shared_hidden_dim < 0 or (shared_gate and not shared_hidden_dim):
            raise ConfigError(
                f"shared_hidden_dim={shared_hidden_dim} must be positive where shared_gate, else at least 0"
            )
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.capacity_factor, self.drop_policy = capacity_factor, option(DropPolicy, "drop_policy", drop_policy)
        if not isinstance(router, str | Mapping | Router):
            raise ConfigError(f"router={router!r} must be a name, a mapping with a name, or a Router")
        terms = make_balance(default_balance(router) if balance is None else balance)
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        needs_bias = terms.bias_rule is not None
        if not isinstance(router, Router):
            sizes = {"dim": dim, "num_experts": num_experts, "top_k": top_k, "score_bias": needs_bias}
            router = make("router", router, ROUTERS, **sizes, batch_invariant=batch_invariant, **at)
        self.router = _fitting(router, dim, num_experts, top_k, needs_bias, batch_invariant)
        nulls = self.router.num_null_experts
        self.balancer = Balancer(terms, num_experts + nulls, nulls, top_k, device)
        self._check_margins()
        expert: dict[str, Any] = {"activation": activation, "bias": bias, "batch_invariant": batch_invariant, **at}
        self.experts = GroupedExperts(
            num_experts, dim, hidden_dim, recompute=recompute, weight_grad_dtype=weight_grad_dtype, **expert
        )
        self.shared = FeedForward(dim, shared_hidden_dim, gate=shared_gate, **expert) if shared_hidden_dim else None
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.pool_counts: PoolCounts | None = None
        self.calls = CallLog()
        self.training_load, self.evaluation_load = LoadCounter(), LoadCounter()
        self.script: Script | None = None
        self.observers = Observers()

    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        token_mask: Bool[Tensor, "*batch"] | None = None,
        token_ids: Integer[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch D"]:
        """Send every token through its experts.

        Waits for the device only in a recomputation (activation checkpointing) while several calls of the same size are
        open, to tell them apart.

        Args:
            x: tokens, floating; ``(..., S, D)`` are sequences of S tokens, for losses over a sequence.
            token_mask: False for padding: no expert, no count, an output of 0 from the routed experts.
            token_ids: ids in the vocabulary, for routers that look at them.

        Raises:
            ShapeError: the last dimension is not D, or mask or ids do not fit.
            DtypeError: x is not floating, the mask is not bool, or x and the weights differ in dtype.
        """
        self._check(x, token_mask, token_ids)
        tokens = x.reshape(-1, self.dim)
        mask = None if token_mask is None else token_mask.reshape(-1)
        if mask is not None:
            tokens = tokens.where(mask[:, None], 0.0)  # padding may hold anything; a NaN times a gradient of 0 is NaN
        ids = None if token_ids is None else token_ids.reshape(-1)
        repeated = in_backward() and (self.training or bool(self.calls.open_calls(training=False)))
        decide = self._replay if repeated else self._decide
        chosen, kept, call = decide(tokens, mask, ids, num_sequences=math.prod(x.shape[:-2]) if len(tokens) else 1)
        parts = self.balancer.parts(chosen, self.router.weight) if self.training else None
        y = self.dispatcher.run(self.experts, tokens, kept)
        if chosen.num_null_experts and self.router.null_output is NullOutput.IDENTITY:
            y = y + (null_weight(chosen)[:, None] * tokens).to(y.dtype)
        if self.shared is not None:
            y = y + self.shared(tokens)
        # No view, which FSDP2 would warn about: nobody else has the tensor that it would be a view of.
        y = torch.ops.aten._unsafe_view(y, x.shape)
        # Counted only now: a call that fails on the way has not happened.
        if not in_backward() and self._count(chosen, kept, tokens):
            return y
        if self.training or torch.is_grad_enabled():
            if not repeated:
                counts = chosen.tokens_per_expert() if self.balancer.step_losses else None
                self.calls.open(call, parts, count_tokens(chosen), counts)
            write_call(self.calls, call)
            y = attach(y, parts, call)
        return y

    def _decide(
        self, x: Tensor, mask: Tensor | None, ids: Tensor | None, num_sequences: int
    ) -> tuple[Routing, Routing, Call]:
        """A new decision: as the router made it, as it is carried out, and what a recomputation needs to know."""
        script = self.script
        replay = script.next(len(x), self.router.num_slots) if script is not None and not script.is_written else None
        chosen = replace(self.router(x, mask, replay, ids), num_sequences=num_sequences)
        kept = without_null(chosen)
        if self.capacity_factor is not None:
            kept = limit_capacity(kept, self.capacity_factor, self.drop_policy, self.top_k)
        return chosen, kept, Call(chosen.expert_ids, kept.expert_ids, chosen.scores, self.training)

    def _replay(
        self, x: Tensor, mask: Tensor | None, ids: Tensor | None, num_sequences: int
    ) -> tuple[Routing, Routing, Call]:
        """The decision of the call that this one repeats, with scores and weights that carry gradients."""
        found: list[Call] = []
        if (known := read_call(self.calls)) is not None:
            self.calls.keep(known)
            found.append(known)

        def recorded(expert_ids: Tensor, scores: Tensor) -> Tensor:
            found.append(self.calls.find(expert_ids, scores, self.training))
            return found[0].chosen

        chosen = self.router(x, mask, recorded if known is None else known.chosen, ids)
        chosen, call = replace(chosen, num_sequences=num_sequences), found[0]
        kept = chosen if call.kept is call.chosen else chosen.keep(call.kept >= 0)
        return chosen, kept, call

    def _count(self, chosen: Routing, kept: Routing, tokens: Tensor) -> bool:
        """Note a new decision; returns whether it is only announced, as the step's own pass comes later."""
        if self.observers.are_any:
            self.observers.show(chosen, kept)
        if self.script is not None and self.script.is_written:
            self.script.write(chosen.expert_ids)
            return True
        (self.training_load if self.training else self.evaluation_load).count(chosen, kept)
        if self.training:
            self.balancer.observe(chosen, tokens, self.router.score_bias)
        return False

    def _check_margins(self) -> None:
        """See that the router has what the bias rule asks for."""
        request, rule, router = self.balancer.request, self.balancer.terms.bias_rule, self.router
        if request is not None and router.num_groups is not None:
            raise ConfigError(
                f"num_groups={router.num_groups} beside {rule}: a token that may not choose an expert has no margin "
                "to it; take score_bias or rms_bias"
            )
        if request is not None and request.ahead and router.adds_noise:
            raise ConfigError(
                f"router={type(router).__name__} beside {rule}: tokens that are scored again have other noise; "
                "take quantile_bias"
            )

    def _check(self, x: Tensor, token_mask: Tensor | None, token_ids: Tensor | None) -> None:
        if not x.is_floating_point():
            raise DtypeError(f"x is {x.dtype}; tokens must be floating (complex and integer tensors are not)")
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ShapeError(f"x has shape {tuple(x.shape)}; its last dimension must be dim={self.dim}")
        if token_mask is not None and token_mask.dtype != torch.bool:
            raise DtypeError(f"token_mask is {token_mask.dtype}; it must be torch.bool, True for tokens that count")
        for name, given in (("token_mask", token_mask), ("token_ids", token_ids)):
            if given is not None and given.shape != x.shape[:-1]:
                raise ShapeError(
                    f"{name} has shape {tuple(given.shape)}; it must be that of x without its last dimension, "
                    f"{tuple(x.shape[:-1])}"
                )

    def extra_repr(self) -> str:
        """Options in the module's printed form."""
        return f"capacity_factor={self.capacity_factor}, drop_policy={self.drop_policy.value}"


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """The MoE layers of a model with their names, in the order of the model's modules."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))


def _fitting(router: Router, dim: int, num_experts: int, top_k: int, needs_bias: bool, batch_invariant: bool) -> Router:
    """The router, if it fits the layer."""
    sizes, wanted = (router.dim, router.num_experts, router.top_k), (dim, num_experts, top_k)
    if sizes != wanted:
        raise ConfigError(f"router has (dim, num_experts, top_k)={sizes}, but the layer has {wanted}")
    if needs_bias and router.score_bias is None:
        raise ConfigError("balance has a bias rule, but router was made with score_bias=False")
    if batch_invariant and not router.batch_invariant:
        raise ConfigError("batch_invariant=True, but router was made with batch_invariant=False")
    return router
