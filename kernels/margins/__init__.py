"""Margins: by how much each token misses each expert, or has it to spare, counted in bins.

Example, 1 token, E=4, K=2, no bias::

    scores     = [[.7, .1, .4, .3]]
    expert_ids = [[0, 2]]
    margins    = [[-.4, .3, -.1, .1]]  # .3 minus the scores of the chosen, below 0; .4 minus those of the others

A chosen expert would lose the token to the best other one, at .3; the others have to beat the worst chosen one, at .4.
So an expert whose bias rose by delta alone would have the tokens with a margin below delta, and the K/E quantile of its
margins is the change of its bias that gives it K/E of the tokens. The histograms of micro-batches and devices add.
"""

import torch
from torch import Tensor

from moe.errors import DtypeError, ShapeError
from moe.kernels.backends import HAS_TRITON, backend_of, register
from moe.kernels.margins import reference
from moe.kernels.margins.bins import BINS, bin_edges, bin_of, quantile

if HAS_TRITON:
    from moe.kernels.margins import triton_backend

__all__ = ["BINS", "bin_edges", "bin_of", "count_margins", "quantile"]


def _fake(scores: Tensor, _expert_ids: Tensor, _score_bias: Tensor, _token_mask: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape[1], BINS, dtype=torch.int32)


_COUNT_MARGINS = register(
    "count_margins", _fake, reference.count_margins, triton_backend.count_margins if HAS_TRITON else None
)


def count_margins(scores: Tensor, expert_ids: Tensor, score_bias: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Count the margins of each expert in bins, for every token that chose experts, in one pass over the scores.

    A token's margin to an expert that it chose is its best score with bias among those that it did not choose, minus
    its score with bias of that expert, in float32; to any other expert it is the worst score with bias of those chosen,
    minus that expert's. A token counts nothing, for no expert, where it is masked, chose all experts or none, has a
    NaN, or compares with a score that is not finite; otherwise it counts once for every expert. There is no gradient.
    On a GPU nothing waits for the device; ids are checked there as :func:`moe.kernels.plan.make_plan` checks them.

    Args:
        scores: ``(T, E)`` float32; on the CPU also float64.
        expert_ids: ``(T, K)`` int32, the decision, values in -1 .. E - 1, -1 for no expert.
        score_bias: ``(E,)`` float32, as it was added to the scores for the decision.
        token_mask: ``(T,)`` bool, False for tokens that count nothing.

    Returns:
        ``(E, BINS)`` int32, by rising margin; :func:`bin_edges` says where the bins are.

    Raises:
        ShapeError: ``scores`` is not a matrix with a column, or another argument does not fit it.
        DtypeError: of an argument.
        ConfigError: an id is out of range.

    Source: quantile balancing, J. Su, https://kexue.fm/archives/11619, which compares with the best score that was not
    chosen in either case: an expert that has to win tokens is then moved too little.
    """
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ShapeError(f"scores has shape {tuple(scores.shape)}, must be (tokens, experts) with experts > 0")
    num_tokens, num_experts = scores.shape
    if expert_ids.ndim != 2 or expert_ids.shape[0] != num_tokens or expert_ids.shape[1] == 0:
        raise ShapeError(f"expert_ids has shape {tuple(expert_ids.shape)}, must be ({num_tokens}, top_k)")
    if score_bias.shape != (num_experts,):
        raise ShapeError(f"score_bias has shape {tuple(score_bias.shape)}, must be ({num_experts},)")
    if token_mask is not None and token_mask.shape != (num_tokens,):
        raise ShapeError(f"token_mask has shape {tuple(token_mask.shape)}, must be ({num_tokens},)")
    floats = (torch.float32,) if scores.device.type == "cuda" else (torch.float32, torch.float64)
    if scores.dtype not in floats:
        raise DtypeError(f"scores has dtype {scores.dtype}, must be {' or '.join(map(str, floats))}")
    expected = ("expert_ids", expert_ids, torch.int32), ("score_bias", score_bias, torch.float32)
    for name, tensor, dtype in (*expected, ("token_mask", token_mask, torch.bool)):
        if tensor is not None and tensor.dtype != dtype:
            raise DtypeError(f"{name} has dtype {tensor.dtype}, must be {dtype}")
    return _COUNT_MARGINS[backend_of(scores)](
        scores.detach().float().contiguous(),
        expert_ids.contiguous(),
        score_bias.detach().contiguous(),
        None if token_mask is None else token_mask.contiguous(),
    )
