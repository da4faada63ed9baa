"""Decisions of one layer, kept for a look at them afterwards: how near they are to flipping, and how far they moved.

Nothing here runs in a training step; checks of what a caller hands in may wait for the device.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.config import require_positive_integer
from moe.errors import ConfigError, ShapeError
from moe.types import Routing


@final
@dataclass(frozen=True)
class Decisions:
    """What a router decided about the tokens of a text, in their order.

    Example, T=3, E=4, K=2; the last token is padding::

        expert_ids = [[0, 2], [1, 0], [-1, -1]]
        token_mask = [True, True, False]

    Raises:
        ConfigError: an id that is no expert.
        ShapeError: scores or a mask of another size.
    """

    expert_ids: Int[Tensor, "T K"]
    """int32; best expert first, -1 for none."""

    num_experts: int
    """E, null experts included."""

    scores: Float[Tensor, "T E"] | None = None
    """What the router chose by; None where they were not kept, to save memory."""

    token_mask: Bool[Tensor, " T"] | None = None
    """True for tokens that count; None when all do."""

    def __post_init__(self) -> None:
        tokens, experts = len(self.expert_ids), self.num_experts
        require_ids("expert_ids", self.expert_ids, "num_experts", experts)
        if self.scores is not None and self.scores.shape != (tokens, experts):
            raise ShapeError(f"scores of shape {tuple(self.scores.shape)} must be (tokens, experts)={tokens, experts}")
        if self.token_mask is not None and len(self.token_mask) != tokens:
            raise ShapeError(f"token_mask has {len(self.token_mask)} tokens, but expert_ids has {tokens}")

    @classmethod
    def of(cls, routings: Iterable[Routing], *, keep_scores: bool = True) -> "Decisions":
        """The decisions of several calls of one router, one after the other, without gradients.

        Args:
            routings: as the router made them, before capacity.
            keep_scores: keep scores too, ``T * E`` numbers.

        Raises:
            ConfigError: no routing at all.
            ShapeError: routings with different numbers of experts or slots.
        """
        calls = list(routings)
        if not calls:
            raise ConfigError("routings=[] must hold at least one decision")
        sizes = {(call.num_experts, call.expert_ids.shape[1]) for call in calls}
        if len(sizes) > 1:
            raise ShapeError(f"routings have (experts, slots) {sorted(sizes)}, but must be of one router")
        mask = None
        if any(call.token_mask is not None for call in calls):
            mask = torch.cat([_counting(call.token_mask, call.expert_ids) for call in calls])
        return cls(
            torch.cat([call.expert_ids for call in calls]),
            calls[0].num_experts,
            torch.cat([call.scores.detach() for call in calls]) if keep_scores else None,
            mask,
        )


@final
@dataclass(frozen=True)
class Drift:
    """How much decisions about the same tokens differ; shares from 0 to 1."""

    changed: Float[Tensor, ""]
    """float32; share of a token's assignments that changed, mean over tokens."""

    first_changed: Float[Tensor, ""]
    """float32; share of tokens whose best expert is another."""


@torch.no_grad()
def router_margin(decisions: Decisions, score_bias: Float[Tensor, " E"] | None = None) -> Float[Tensor, ""]:
    """How near decisions are to flipping: the worst chosen score minus the best one that was not chosen.

    Mean over the tokens that have an expert and could have another one. 0 where there is no such token. Top-k by these
    scores gives no negative gap; decisions that do not take a token's best scores can: under groups or noise, by expert
    choice, hash, Sinkhorn or BASE, or replayed.

    Args:
        decisions: with scores.
        score_bias: what was added to the scores for selection, ``router.score_bias``.

    Returns:
        Scalar of the dtype of the scores.

    Raises:
        ConfigError: decisions without scores.
        ShapeError: a bias of another number of experts.
    """
    if decisions.scores is None:
        raise ConfigError("decisions have scores=None; keep the scores to get a margin")
    if score_bias is not None and score_bias.shape != (decisions.num_experts,):
        raise ShapeError(f"score_bias of shape {tuple(score_bias.shape)} must be ({decisions.num_experts},)")
    scores = decisions.scores if score_bias is None else decisions.scores + score_bias
    chosen = _chosen(decisions.expert_ids, decisions.num_experts)
    worst = scores.masked_fill(~chosen, torch.inf).amin(-1)
    best = scores.masked_fill(chosen, -torch.inf).amax(-1)
    counts = chosen.any(-1) & ~chosen.all(-1)
    return (worst - best).masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)


@torch.no_grad()
def decision_drift(before: Decisions, after: Decisions) -> Drift:
    """How far two checkpoints differ in their decisions on the same text.

    With A and B the experts of a token before and after, the share that changed is ``1 - |A & B| / max(|A|, |B|)``:
    of K, where both have K experts. The mean is over tokens that have an expert before or after, so padding is not in
    it; without such a token it is 0. Two balanced routers that have nothing to do with each other share K/E of their
    choices by chance: ``1 - K/E`` is a complete change.

    Args:
        before: of one checkpoint.
        after: of the other; it may have another number of slots.

    Raises:
        ShapeError: decisions of other tokens: their number, their mask, or the number of experts differs.

    Source: the complement of router saturation, OLMoE, arXiv 2409.02060, section 5.1.
    """
    sizes = [(len(each.expert_ids), each.num_experts) for each in (before, after)]
    if sizes[0] != sizes[1]:
        raise ShapeError(f"before and after have (tokens, experts) {sizes[0]} and {sizes[1]}, but must be the same")
    counting, other = (_counting(each.token_mask, each.expert_ids) for each in (before, after))
    if not torch.equal(counting, other):
        raise ShapeError("before and after have different token_mask, so they are not of the same tokens")
    sets = [_chosen(each.expert_ids, each.num_experts) for each in (before, after)]
    common, most = (sets[0] & sets[1]).sum(-1), torch.maximum(sets[0].sum(-1), sets[1].sum(-1))
    changed = 1 - common / most.clamp(min=1)
    compared = most > 0
    first = (before.expert_ids[:, 0] != after.expert_ids[:, 0]) & compared
    tokens = compared.sum().clamp(min=1)
    return Drift(changed.masked_fill(~compared, 0.0).sum() / tokens, first.sum() / tokens)


def require_ids(name: str, ids: Tensor, size_name: str, size: int) -> None:
    """Raise a ConfigError unless all ids are from -1 to ``size - 1``; waits for the device."""
    require_positive_integer(**{size_name: size})
    if ids.numel() == 0:
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < -1 or high >= size:
        raise ConfigError(f"{name} from {low} to {high} must be from -1 to {size - 1}, since {size_name}={size}")


def _counting(mask: Tensor | None, expert_ids: Tensor) -> Tensor:
    """The tokens that count, ``(T,)`` bool."""
    return torch.ones(len(expert_ids), dtype=torch.bool, device=expert_ids.device) if mask is None else mask


def _chosen(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Which experts a token has, ``(T, E)`` bool; the column of -1 is left out."""
    flags = torch.zeros(len(expert_ids), num_experts + 1, dtype=torch.bool, device=expert_ids.device)
    return flags.scatter_(1, expert_ids.long() + 1, value=True)[:, 1:]
