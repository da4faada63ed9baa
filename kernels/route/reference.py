"""Routing in PyTorch and NumPy: the definition, and the path of the CPU."""

from collections.abc import Callable
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

CHUNK_KEYS = 2**17  # keys that are searched at once: few enough to stay in a core's cache


class ScoreFunction(StrEnum):
    """What turns a token's logits into scores."""

    SOFTMAX = "softmax"
    """exp(logit) over the sum of all experts' (arXiv 1701.06538, without its noise)."""
    SIGMOID = "sigmoid"
    """1 / (1 + exp(-logit)) of each expert alone (DeepSeek-V3, arXiv 2412.19437, equation 15)."""
    SQRT_SOFTPLUS = "sqrt_softplus"
    """sqrt(log(1 + exp(logit))) of each expert alone (DeepSeek-V4, arXiv 2606.19348)."""

    def of(self, logits: Tensor) -> Tensor:
        """Turn logits ``(T, E)`` into scores of the same shape and dtype."""
        if self is ScoreFunction.SOFTMAX:
            return logits.softmax(-1)
        if self is ScoreFunction.SIGMOID:
            return logits.sigmoid()
        squared = softplus(logits, threshold=40)  # beyond it softplus(x) is x in float64 too
        underflowed = squared == 0  # where the gradient is 0, and that of a square root would be infinite
        return squared.masked_fill(underflowed, 1).sqrt().masked_fill(underflowed, 0)


def best_columns(keys: Tensor, k: int) -> Tensor:
    """The columns of the ``k`` largest keys of each row, largest first, equal keys by rising column, NaN above all.

    Args:
        keys: ``(T, E)``.
        k: at most E.

    Returns:
        ``(T, k)`` int32.
    """
    return torch.sort(keys, dim=-1, descending=True, stable=True).indices[:, :k].int()


def search_best_columns(keys: Tensor, k: int) -> Tensor:
    """:func:`best_columns` of a CPU tensor by ``k`` searches, which is several times as fast but reads values."""
    num_rows, num_columns = keys.shape
    found = np.empty((num_rows, k), np.int32)
    lost = np.zeros(num_rows, bool)
    rows_at_once = max(1, CHUNK_KEYS // num_columns)
    for first in range(0, num_rows, rows_at_once):
        part = keys[first : first + rows_at_once].detach().numpy().copy()
        flat, starts = part.reshape(-1), np.arange(len(part)) * num_columns
        for choice in range(k):
            # NumPy's argmax takes the first of equals, and NaN for the largest, as a stable sort does.
            best = part.argmax(-1)
            found[first : first + rows_at_once, choice] = best
            best += starts
            if choice == k - 1:
                # What has been found becomes -inf, so a row whose own keys are -inf may find one of them again.
                lost[first : first + rows_at_once] = flat[best] == -np.inf
            flat[best] = -np.inf
    columns = torch.from_numpy(found)
    if lost.any():
        again = torch.from_numpy(lost)
        columns[again] = best_columns(keys[again], k)
    return columns


def _columns_of_best_groups(
    biased: Tensor, num_groups: int, top_groups: int, best: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """``(T, top_groups * E / num_groups)``: the experts of each token's best groups, ascending."""
    size = biased.shape[1] // num_groups
    members = biased.reshape(-1, size)
    top = members.gather(1, best(members, min(2, size)).long()).sum(-1)
    groups = best(top.view(-1, num_groups), top_groups).long().sort(-1).values
    return (groups[:, :, None] * size + torch.arange(size, device=biased.device)).flatten(1)


def choose(
    logits: Tensor,
    scores: Tensor,
    score_bias: Tensor | None,
    top_k: int,
    by_score: bool,
    num_groups: int,
    top_groups: int,
    best: Callable[[Tensor, int], Tensor] = best_columns,
) -> Tensor:
    """Choose each token's experts, best first; see :func:`moe.kernels.route.route`.

    Args:
        logits: ``(T, E)``.
        scores: ``(T, E)``.
        score_bias: ``(E,)`` or None.
        top_k: K.
        by_score: compare scores even without a bias.
        num_groups: how many groups the experts form.
        top_groups: how many of them a token may choose from.
        best: what finds the largest keys; :func:`best_columns` can be traced and runs on any device.

    Returns:
        ``(T, K)`` int32.
    """
    biased = scores if score_bias is None else scores + score_bias
    keys = logits if score_bias is None and not by_score else biased
    if num_groups == 1:
        return best(keys, top_k)
    columns = _columns_of_best_groups(biased, num_groups, top_groups, best)
    return columns.gather(1, best(keys.gather(1, columns), top_k).long()).int()


def _scores(logits: Tensor, score_function: str) -> Tensor:
    """``ScoreFunction.of`` without a trace; a token's scores do not depend on its place in the batch."""
    if score_function == ScoreFunction.SOFTMAX:
        return logits.softmax(-1)
    # PyTorch's exponential rounds what is left over behind the last full vector otherwise than the rest, NumPy's alike.
    values = logits.detach().numpy()
    if score_function == ScoreFunction.SIGMOID:
        scores = np.negative(values)
        with np.errstate(over="ignore"):  # 1 / inf is right
            np.exp(scores, out=scores)
        scores += 1
        return torch.from_numpy(np.reciprocal(scores, out=scores))
    scores = np.abs(values)
    np.negative(scores, out=scores)
    np.exp(scores, out=scores)
    np.log1p(scores, out=scores)
    scores += np.maximum(values, 0)
    return torch.from_numpy(np.sqrt(scores, out=scores))


def _half_log_slope(scores: Tensor) -> Tensor:
    """The derivative of a score ``s = sqrt(softplus(logit))`` over it, ``(1 - exp(-s^2)) / (2 s^2)``; 1/2 at 0."""
    squared = np.square(scores.detach().numpy())
    with np.errstate(invalid="ignore"):  # 0 / 0
        slope = -0.5 * (np.expm1(-squared) / squared)
    slope[squared == 0] = 0.5
    return torch.from_numpy(slope)


def _chosen_scores(scores: Tensor, expert_ids: Tensor) -> Tensor:
    return scores.gather(1, expert_ids.clamp(min=0).long()).masked_fill(expert_ids < 0, 0.0)


def weights_of(scores: Tensor, expert_ids: Tensor, normalize: bool, scale: float) -> Tensor:
    """Weights of the chosen experts: their scores, normalised if asked, scaled; 0 for no expert.

    Args:
        scores: ``(T, E)``.
        expert_ids: ``(T, K)`` int32, -1 for none.
        normalize: divide a token's chosen scores by their sum.
        scale: factor on the weights.

    Returns:
        ``(T, K)``, dtype of ``scores``; gradients flow to ``scores``.
    """
    chosen = _chosen_scores(scores, expert_ids)
    if normalize:
        # The floor matters only where every chosen score is 0 or has underflowed; it is the smallest normal number.
        chosen = chosen / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).tiny)
    return chosen * scale


def route(
    logits: Tensor,
    score_bias: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
    top_k: int,
    score_function: str,
    by_score: bool,
    normalize: bool,
    scale: float,
    num_groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, selection (unless ids are given) and weights; see :func:`moe.kernels.route.route` and ``weigh``.

    Returns:
        ``expert_ids (T, K)`` int32, ``weights (T, K)`` and ``scores (T, E)``.
    """
    scores = _scores(logits, score_function)
    if given is not None:
        return given.clone(), weights_of(scores, given, normalize, scale), scores
    expert_ids = choose(logits, scores, score_bias, top_k, by_score, num_groups, top_groups, search_best_columns)
    if token_mask is not None:
        expert_ids.masked_fill_(~token_mask[:, None], -1)
    return expert_ids, weights_of(scores, expert_ids, normalize, scale), scores


def route_backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    scores: Tensor,
    expert_ids: Tensor,
    score_function: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits in :func:`route`.

    Every term is multiplied by its score before anything else: nothing is divided by a score, so that one which has
    underflowed makes no infinity.

    Args:
        grad_weights: ``(T, K)``, or None for zero.
        grad_scores: ``(T, E)``, or None for zero.
        scores: ``(T, E)``.
        expert_ids: ``(T, K)`` int32, -1 for none.
        score_function: a ``ScoreFunction``.
        normalize: as it was in the forward pass.
        scale: as it was in the forward pass.

    Returns:
        ``(T, E)``, dtype of ``scores``.
    """
    terms = torch.zeros_like(scores) if grad_scores is None else scores * grad_scores
    if grad_weights is not None:
        share = _chosen_scores(scores, expert_ids)
        grad = grad_weights.masked_fill(expert_ids < 0, 0.0)
        mean: Tensor | float = 0.0
        if normalize:
            total, tiny = share.sum(-1, keepdim=True), torch.finfo(share.dtype).tiny
            share = share / total.clamp(min=tiny)
            mean = (share * grad).sum(-1, keepdim=True).masked_fill(total < tiny, 0.0)  # a floor has no gradient
        terms.scatter_add_(1, expert_ids.clamp(min=0).long(), scale * share * (grad - mean))
    if score_function == ScoreFunction.SOFTMAX:
        return terms.addcmul_(scores, terms.sum(-1, keepdim=True), value=-1)
    return terms.mul_(1 - scores if score_function == ScoreFunction.SIGMOID else _half_log_slope(scores))
