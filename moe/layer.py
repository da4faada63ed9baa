"""The layer: router, balance, dispatch and experts put together; and what is done to all layers of a model at once.

Sizes: T tokens, D dim, E experts, F hidden_dim, K experts per token.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.balance import BalanceSpec, Call, CallLog, attach, count_tokens, in_backward, make_balance
from moe.config import DropPolicy, make, option, require_positive, require_positive_integer, require_top_k
from moe.dispatch import Dispatcher, LocalDispatcher
from moe.errors import ConfigError, DtypeError, ShapeError
from moe.experts import FeedForward, GroupedExperts
from moe.monitor import LoadCounter, LoadStats
from moe.routing import ROUTERS, Router, limit_capacity
from moe.types import Routing

DEFAULT_BALANCE: Mapping[str, Mapping[str, Any]] = {"squared_deviation": {"coefficient": 0.01}}
"""What balances a layer unless told otherwise."""

PoolLoads = Callable[[Sequence[LoadStats]], list[LoadStats]]
"""Adds up the loads of several layers over all devices that see other tokens."""


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
            assignments and drops the rest.
        drop_policy: what is dropped, see ``moe.config.DropPolicy``.
        recompute: "none", or "up": the routed experts keep only their input and the routing for backward, see
            ``moe.config.Recompute``.
        weight_grad_dtype: of the routed experts' gradients; ``torch.float32`` sums up the micro-batches of a bfloat16
            model without rounding each. Not under ``torch.compile``. None for the dtype of the parameters.
        batch_invariant: a token's output does not depend, in any bit, on what else is in its batch (with a capacity it
            does, on what is dropped). See docs/explanation/determinism.md for what it costs.
        balance: losses and at most one selection bias, as objects or as a mapping of names to options, see
            ``moe.balance.make_balance``. ``()`` for none.

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
        balance: BalanceSpec = DEFAULT_BALANCE,
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
        self.balance_losses, self.bias_rule = make_balance(balance)
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        if not isinstance(router, str | Mapping | Router):
            raise ConfigError(f"router={router!r} must be a name, a mapping with a name, or a Router")
        if not isinstance(router, Router):
            sizes = {"dim": dim, "num_experts": num_experts, "top_k": top_k, "score_bias": self.bias_rule is not None}
            router = make("router", router, ROUTERS, **sizes, batch_invariant=batch_invariant, **at)
        self.router = _fitting(router, dim, num_experts, top_k, self.bias_rule is not None, batch_invariant)
        expert: dict[str, Any] = {"activation": activation, "bias": bias, "batch_invariant": batch_invariant, **at}
        self.experts = GroupedExperts(
            num_experts, dim, hidden_dim, recompute=recompute, weight_grad_dtype=weight_grad_dtype, **expert
        )
        self.shared = FeedForward(dim, shared_hidden_dim, gate=shared_gate, **expert) if shared_hidden_dim else None
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.pool_loads: PoolLoads | None = None
        self.calls = CallLog()
        self.training_load, self.evaluation_load = LoadCounter(), LoadCounter()

    def forward(
        self, x: Float[Tensor, "*batch D"], token_mask: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch D"]:
        """Send every token through its experts.

        Waits for the device only in a recomputation (activation checkpointing) while several calls of the same size are
        open, to tell them apart.

        Args:
            x: tokens, floating.
            token_mask: False for padding: no expert, no count, an output of 0 from the routed experts.

        Raises:
            ShapeError: the last dimension is not D, or the mask does not fit.
            DtypeError: x is not floating, the mask is not bool, or x and the weights differ in dtype.
        """
        self._check(x, token_mask)
        tokens = x.reshape(-1, self.dim)
        mask = None if token_mask is None else token_mask.reshape(-1)
        if mask is not None:
            tokens = tokens.where(mask[:, None], 0.0)  # padding may hold anything; a NaN times a gradient of 0 is NaN
        repeated = in_backward() and (self.training or bool(self.calls.open_calls(training=False)))
        chosen, kept, call = self._replay(tokens, mask) if repeated else self._decide(tokens, mask)
        loss = self._loss(chosen)
        y = self.dispatcher.run(self.experts, tokens, kept)
        if self.shared is not None:
            y = y + self.shared(tokens)
        # No view, which FSDP2 would warn about: nobody else has the tensor that it would be a view of.
        y = torch.ops.aten._unsafe_view(y, x.shape)
        # Counted only now: a call that fails on the way has not happened.
        if not in_backward():
            (self.training_load if self.training else self.evaluation_load).count(chosen, kept)
        if self.training or torch.is_grad_enabled():
            if not repeated:
                self.calls.open(call, loss, count_tokens(chosen))
            y = attach(y, loss, call)
        return y

    def _decide(self, x: Tensor, mask: Tensor | None) -> tuple[Routing, Routing, Call]:
        """A new decision: as the router made it, after capacity, and what a recomputation needs to know."""
        chosen = kept = self.router(x, mask)
        if self.capacity_factor is not None:
            kept = limit_capacity(chosen, self.capacity_factor, self.drop_policy)
        return chosen, kept, Call(chosen.expert_ids, kept.expert_ids, chosen.scores, self.training)

    def _replay(self, x: Tensor, mask: Tensor | None) -> tuple[Routing, Routing, Call]:
        """The decision of the call that this one repeats, with scores and weights that carry gradients."""
        found: list[Call] = []

        def recorded(expert_ids: Tensor, scores: Tensor) -> Tensor:
            found.append(self.calls.find(expert_ids, scores, self.training))
            return found[0].chosen

        chosen = self.router(x, mask, recorded)
        call = found[0]
        kept = chosen if call.kept is call.chosen else chosen.keep(call.kept >= 0)
        return chosen, kept, call

    def _loss(self, chosen: Routing) -> Float[Tensor, ""] | None:
        """The sum of the layer's losses with their coefficients; None in evaluation or without any."""
        if not (self.training and self.balance_losses):
            return None
        return torch.stack([loss.coefficient * loss(chosen) for loss in self.balance_losses]).sum()

    def _check(self, x: Tensor, token_mask: Tensor | None) -> None:
        if not x.is_floating_point():
            raise DtypeError(f"x is {x.dtype}; tokens must be floating (complex and integer tensors are not)")
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ShapeError(f"x has shape {tuple(x.shape)}; its last dimension must be dim={self.dim}")
        if token_mask is None:
            return
        if token_mask.dtype != torch.bool:
            raise DtypeError(f"token_mask is {token_mask.dtype}; it must be torch.bool, True for tokens that count")
        if token_mask.shape != x.shape[:-1]:
            raise ShapeError(
                f"token_mask has shape {tuple(token_mask.shape)}; it must be that of x without its last "
                f"dimension, {tuple(x.shape[:-1])}"
            )

    def extra_repr(self) -> str:
        """Options in the module's printed form."""
        terms = [*self.balance_losses, *([self.bias_rule] if self.bias_rule else [])]
        return f"capacity_factor={self.capacity_factor}, drop_policy={self.drop_policy.value}, balance={terms}"


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """The MoE layers of a model with their names, in the order of the model's modules."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))


def balance_loss(model: nn.Module) -> Float[Tensor, ""]:
    """What to add to the training loss: the sum over layers of the balance losses of the calls since the last time.

    Call it once for each forward pass, before ``backward()``. Over several forward passes it is their mean, weighted
    by the tokens that count. Under gradient accumulation divide it as you divide the loss.

    Returns:
        Scalar; 0 for a model without MoE layers, without balance losses, or in evaluation mode.
    """
    losses = [loss for _, layer in moe_layers(model) if (loss := layer.calls.collect()) is not None]
    if not losses:
        parameter = next(model.parameters(), None)
        return torch.zeros((), device=None if parameter is None else parameter.device)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def balance_step(model: nn.Module, *, skipped: bool = False) -> dict[str, LoadStats]:
    """End an optimizer step: move the selection biases, and return each layer's load of the whole step.

    Call it once after ``optimizer.step()``. All calls in training mode since the last time count, so micro-batches add
    up; recomputations of activation checkpointing do not count.

    Args:
        model: any module that contains ``MoE`` layers.
        skipped: the optimizer step was left out (its loss was not finite, say), so the biases stay too.

    Returns:
        Load by layer name; layers that saw no call are left out.
    """
    for name, layer in moe_layers(model):
        if uncollected := layer.calls.end_step():
            warnings.warn(
                f"{uncollected} balance losses of layer {name!r} were never collected and balance nothing: add "
                "moe.balance_loss(model) to the training loss, or construct MoE with balance=()",
                stacklevel=2,
            )
    loads = _take(model, lambda layer: layer.training_load)
    for name, layer in moe_layers(model):
        bias = layer.router.score_bias
        if layer.bias_rule is not None and bias is not None and name in loads and not skipped:
            with torch.no_grad():
                bias.copy_(layer.bias_rule.updated(bias, loads[name].tokens_per_expert))
    return loads


def take_evaluation_load(model: nn.Module) -> dict[str, LoadStats]:
    """Each layer's load of the calls in evaluation mode since the last time; layers without a call are left out."""
    return _take(model, lambda layer: layer.evaluation_load)


def _take(model: nn.Module, counter: Callable[[MoE], LoadCounter]) -> dict[str, LoadStats]:
    """What the counters of all layers hold, over all devices; of spread layers also those without a call here."""
    loads: dict[str, LoadStats] = {}
    spread: dict[PoolLoads, dict[str, LoadStats]] = {}
    for name, layer in moe_layers(model):
        stats = counter(layer).take()
        if layer.pool_loads is not None:
            nothing = LoadStats.zero(layer.num_experts, layer.router.weight.device)
            spread.setdefault(layer.pool_loads, {})[name] = nothing if stats is None else stats
        elif stats is not None:
            loads[name] = stats
    for pool, theirs in spread.items():
        loads |= zip(theirs, pool(list(theirs.values())))
    return {name: loads[name] for name, _ in moe_layers(model) if name in loads}


def _fitting(router: Router, dim: int, num_experts: int, top_k: int, needs_bias: bool, batch_invariant: bool) -> Router:
    """The router, if it fits the layer."""
    sizes, wanted = (router.dim, router.num_experts, router.top_k), (dim, num_experts, top_k)
    if sizes != wanted:
        raise ConfigError(f"router has (dim, num_experts, top_k)={sizes}, but the layer has {wanted}")
    if needs_bias and router.score_bias is None:
        raise ConfigError("balance has a ScoreBias, but router was made with score_bias=False")
    if batch_invariant and not router.batch_invariant:
        raise ConfigError("batch_invariant=True, but router was made with batch_invariant=False")
    return router
