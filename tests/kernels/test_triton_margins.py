"""The kernel that counts margins, written for a GPU: against the definition, in memory poisoned with NaN."""

import math

import pytest
import torch
from torch import Tensor

from moe.kernels.margins import BINS, count_margins, reference
from tests.support.kernels import naive_margin_counts, poisoned_memory

pytestmark = pytest.mark.gpu

SIZES = [(70, 5, 2), (9, 128, 8), (40, 33, 1), (3, 1024, 6), (20, 6, 6), (5, 1, 1), (0, 8, 2)]  # tokens, experts, top_k


def decision(tokens: int, experts: int, top_k: int, ties: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of many sizes, the bias, ids with some of no expert, and a mask."""
    generator = torch.Generator().manual_seed(experts)
    scores, bias = (torch.randn(*shape, generator=generator) for shape in ((tokens, experts), (experts,)))
    scores *= 2.0 ** torch.randint(-24, 5, (tokens, 1), generator=generator)
    if ties:
        scores, bias = scores.round(), bias.round()
    ids = (scores + bias).topk(top_k).indices.int()
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    return scores, ids, bias, torch.rand(tokens, generator=generator) < 0.7


def on_gpu(scores: Tensor, ids: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    with poisoned_memory():
        counts = count_margins(scores.cuda(), ids.cuda(), bias.cuda(), None if mask is None else mask.cuda())
    assert (counts.shape, counts.dtype) == ((scores.shape[1], BINS), torch.int32)
    return counts.cpu()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_counts_as_the_definition_does(sizes: tuple[int, int, int], ties: bool) -> None:
    scores, ids, bias, mask = decision(*sizes, ties)
    for given in (mask, None):
        counts = on_gpu(scores, ids, bias, given)
        assert torch.equal(counts, naive_margin_counts(scores, ids, bias, given))
        assert torch.equal(counts, reference.count_margins(scores, ids, bias, given))


def test_every_kind_of_float() -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-20, 16.0, 1e38, -1e38, math.inf, -math.inf, math.nan])
    generator = torch.Generator().manual_seed(0)
    scores = special[torch.randint(0, len(special), (200, 4), generator=generator)]
    ids = torch.randint(-1, 4, (200, 2), generator=generator, dtype=torch.int32)
    bias = torch.full((4,), -0.0)  # leaves a score of -0 what it is
    counts = on_gpu(scores, ids, bias, None)
    assert counts.sum() > 0
    assert torch.equal(counts, naive_margin_counts(scores, ids, bias, None))


def test_all_tokens_to_one_expert() -> None:
    scores = torch.rand(150, 5) + torch.tensor([0, 0, 0, 2.0, 0])
    ids = torch.full((150, 1), 3, dtype=torch.int32)
    assert torch.equal(
        on_gpu(scores, ids, torch.zeros(5), None), naive_margin_counts(scores, ids, torch.zeros(5), None)
    )
