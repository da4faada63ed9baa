"""The margins' histogram in PyTorch: the definition, and the path of the CPU."""

import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.kernels.margins.bins import BINS, SIDE, write_bins

CHUNK_SCORES = 2**18  # scores that are binned at once: few enough to stay in a core's cache


def _write_margins(scores: Tensor, expert_ids: Tensor, score_bias: Tensor, columns: Tensor) -> Tensor:
    """Write some tokens' margins, and return ``(T,)`` which of these tokens count.

    Args:
        scores: ``(T, E)``.
        expert_ids: ``(T, K)`` int32.
        score_bias: ``(E,)``.
        columns: ``(T, 1 + E)``, contiguous; the first stands for no expert, whose score is -inf.
    """
    columns[:, 0] = -torch.inf
    torch.add(scores, score_bias, out=columns[:, 1:])
    flat = columns.view(-1)
    places = (expert_ids + torch.arange(1, flat.shape[0], columns.shape[1])[:, None]).view(-1)
    chosen = flat.index_select(0, places).view_as(expert_ids)
    flat.index_fill_(0, places, -torch.inf)
    best = columns.amax(-1, keepdim=True).add_(0.0)  # not -0, and then no margin is
    worst = chosen.masked_fill(expert_ids < 0, torch.inf).amin(-1, keepdim=True).add_(0.0)
    torch.sub(worst, columns, out=columns)
    flat.index_copy_(0, places, (best - chosen).view(-1))
    # Both are NaN where a score of theirs is, and infinite where all experts are chosen or none.
    return (best.isfinite() & worst.isfinite()).view(-1)


def count_margins(scores: Tensor, expert_ids: Tensor, score_bias: Tensor, token_mask: Tensor | None) -> Tensor:
    """Count the margins of each expert in bins; see :func:`moe.kernels.margins.count_margins`.

    Returns:
        ``(E, BINS)`` int32.

    Raises:
        ConfigError: an id is out of range.
    """
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:
        return torch.zeros(num_experts, BINS, dtype=torch.int32)
    low, high = (int(bound) for bound in expert_ids.aminmax())
    if low < -1 or high >= num_experts:
        raise ConfigError(f"expert_ids has values {low} .. {high}, must be -1 .. E - 1 = {num_experts - 1}")
    # A histogram of no expert comes first, where tokens that do not count are counted.
    places = torch.empty(num_tokens, 1 + num_experts, dtype=torch.int32)
    zero_bins = torch.arange(SIDE, (1 + num_experts) * BINS, BINS, dtype=torch.int32)
    tokens_at_once = min(num_tokens, max(1, CHUNK_SCORES // num_experts))
    columns = torch.empty(tokens_at_once, 1 + num_experts)
    for first in range(0, num_tokens, tokens_at_once):
        part = slice(first, first + tokens_at_once)
        margins = columns[: num_tokens - first]
        counted = _write_margins(scores[part], expert_ids[part], score_bias, margins)
        write_bins(margins, places[part]).add_(zero_bins)
        if token_mask is not None:
            counted &= token_mask[part]
        if not counted.all():
            places[part].index_fill_(0, (~counted).nonzero().view(-1), 0)
    counts = torch.bincount(places.view(-1), minlength=(1 + num_experts) * BINS)
    return counts[BINS:].view(num_experts, BINS).int()
