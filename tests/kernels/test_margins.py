"""Margins and their histogram on the CPU: the example, the definition by loops, what they mean, and the quantile."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.errors import ConfigError, DtypeError, ShapeError
from moe.kernels.margins import BINS, bin_edges, bin_of, count_margins, quantile, reference
from tests.support.kernels import MARGIN_EDGES, naive_bin, naive_margin_counts, poisoned_memory


def test_the_documented_example() -> None:
    scores, ids = torch.tensor([[0.7, 0.1, 0.4, 0.3]]), torch.tensor([[0, 2]], dtype=torch.int32)
    counts = count_margins(scores, ids, torch.zeros(4))
    assert (counts.shape, counts.dtype) == ((4, BINS), torch.int32)
    assert counts.nonzero()[:, 1].tolist() == [naive_bin(margin) for margin in (-0.4, 0.3, -0.1, 0.1)]


SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0**-20, 16.0, 1e-30, 1e38, math.inf, -math.inf, math.nan]


@st.composite
def decisions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scores of any size, sometimes all of few values; any ids, often one for all or all experts; bias and mask."""
    tokens, experts = draw(st.integers(0, 8)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    value = draw(st.sampled_from([st.sampled_from(SPECIAL), st.floats(-1, 1, width=32), st.floats(-20, 20, width=32)]))
    scores = torch.tensor(draw(st.lists(value, min_size=tokens * experts, max_size=tokens * experts)))
    order = st.permutations(range(experts)).map(lambda order: list(order[:top_k]))
    some = st.lists(st.integers(-1, experts - 1), min_size=top_k, max_size=top_k)
    ids = draw(st.lists(order | some, min_size=tokens, max_size=tokens) | order.map(lambda ids: [ids] * tokens))
    bias = torch.tensor(draw(st.lists(st.floats(-1, 1, width=32), min_size=experts, max_size=experts)))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)), dtype=torch.bool)
    expert_ids = torch.tensor(ids, dtype=torch.int32).view(tokens, top_k)
    return scores.view(tokens, experts).float(), expert_ids, bias, draw(st.sampled_from([mask, None]))


@given(decisions())
def test_counts_as_the_definition_does(decision: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
    with poisoned_memory():
        counts = count_margins(*decision)
    assert torch.equal(counts, naive_margin_counts(*decision))
    assert len(set(counts.sum(-1).tolist())) == 1  # a token counts once for every expert, or for none


def decision(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    scores, bias = torch.rand(tokens, experts), torch.randn(experts) * 0.3
    return scores, (scores + bias).topk(top_k).indices.int(), bias


def test_goes_on_behind_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, ids, bias = decision(50, 5, 2)
    ids[7] = -1
    mask = torch.rand(50) < 0.8
    monkeypatch.setattr(reference, "CHUNK_SCORES", 40)  # 8 tokens; the last chunk is not full
    assert torch.equal(count_margins(scores, ids, bias, mask), naive_margin_counts(scores, ids, bias, mask))


def test_zeros_of_either_sign_are_alike() -> None:
    scores, ids = torch.tensor([[-0.0, 0.0, 1.0]]), torch.tensor([[1, 2]], dtype=torch.int32)
    counts = count_margins(scores, ids, torch.full((3,), -0.0))  # -0 - 0 is -0
    assert counts[:2].nonzero()[:, 1].tolist() == [naive_bin(0.0)] * 2


def test_margins_are_never_minus_zero() -> None:
    """A chosen and an unchosen expert at -0: both margins are 0, and open the bin of 0."""
    scores, ids = torch.tensor([[-0.0, -0.0]]), torch.tensor([[1]], dtype=torch.int32)
    assert count_margins(scores, ids, torch.full((2,), -0.0)).nonzero()[:, 1].tolist() == [naive_bin(0.0)] * 2


def test_counts_below_an_edge_are_the_tokens_that_an_expert_would_have() -> None:
    # Sums are exact, and no two experts' differ by a multiple of 2^-10, as the edges tried are.
    scores = torch.randint(0, 2**10, (400, 6)) * 2.0**-10 + torch.arange(6) * 2.0**-14
    bias = torch.tensor([0.5, 0.0, -0.25, 0.0, 0.125, 0.0])
    counts = count_margins(scores, (scores + bias).topk(2).indices.int(), bias)
    for delta in (-0.375, -0.03125, 0.0, 0.0625, 0.28125, 0.5):
        below = (bin_edges() == delta).nonzero().item()
        for expert in range(6):
            moved = bias + delta * (torch.arange(6) == expert)
            chosen = ((scores + moved).topk(2).indices == expert).any(-1).sum()
            assert counts[expert, :below].sum() == chosen, (delta, expert)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("chosen", [True, False])
def test_a_poisoned_token_changes_no_other_tokens_counts(value: float, chosen: bool) -> None:
    scores, ids, bias = decision(30, 7, 3)
    others = torch.arange(30) != 11
    expected = count_margins(scores, ids, bias, others)
    expert = ids[11, 1] if chosen else next(e for e in range(7) if e not in ids[11])
    scores[11, expert] = value
    assert torch.equal(count_margins(scores, ids, bias, others), expected)
    found = count_margins(scores, ids, bias) - expected
    counts_itself = (value == math.inf) == chosen and not math.isnan(value)  # the others can still be compared
    assert found.sum(-1).tolist() == [int(counts_itself)] * 7
    assert (found >= 0).all()


def test_takes_any_strides_and_float64() -> None:
    scores, ids, bias = torch.rand(6, 18)[:, ::2], torch.randint(9, (6, 4)).int()[:, ::2], torch.randn(18)[::2]
    mask = torch.tensor([True, False] * 6)[::2]
    expected = count_margins(*(part.contiguous() for part in (scores, ids, bias, mask)))
    assert torch.equal(count_margins(scores, ids, bias, mask), expected)
    assert torch.equal(count_margins(scores.double().requires_grad_(), ids, bias, mask), expected)


def test_shapes_without_data() -> None:
    scores, ids = torch.empty(7, 4, device="meta"), torch.empty(7, 2, dtype=torch.int32, device="meta")
    counts = count_margins(scores, ids, torch.empty(4, device="meta"))
    assert (counts.shape, counts.dtype, counts.device.type) == ((4, BINS), torch.int32, "meta")
    assert quantile(counts, 0.5).shape == (4,)


def test_edges_and_bins_are_those_of_the_definition() -> None:
    edges = bin_edges()
    assert (edges.shape, edges.dtype) == ((BINS + 1,), torch.float32)
    above = [*MARGIN_EDGES, 16.0]
    assert edges.tolist() == [*(-edge for edge in above[:0:-1]), *above]
    around = torch.cat([edges, edges.nextafter(torch.tensor(math.inf)), edges.nextafter(torch.tensor(-math.inf))])
    margins = torch.cat([around, torch.tensor([-0.0, 1e-45, -1e-45, 3e38, -3e38, math.inf, -math.inf])])
    assert bin_of(margins).tolist() == [naive_bin(margin) for margin in margins.tolist()]
    assert bin_of(margins).dtype == torch.int32
    assert torch.equal(bin_of(margins.double()), bin_of(margins))
    assert 0 <= bin_of(torch.tensor(math.nan)) < BINS


def counts_of(margins: list[float]) -> Tensor:
    return torch.bincount(bin_of(torch.tensor(margins)), minlength=BINS).int()


@given(st.lists(st.floats(-15, 15, width=32) | st.floats(-(2**-10), 2**-10, width=32), min_size=1), st.floats(0, 1))
def test_the_quantile_is_within_one_bin_of_the_exact_one(margins: list[float], share: float) -> None:
    exact = np.sort(margins)[max(math.ceil(share * len(margins)), 1) - 1]
    found = quantile(counts_of(margins)[None], share)
    assert (found.shape, found.dtype) == ((1,), torch.float32)
    assert abs(bin_of(found).item() - naive_bin(exact)) <= 1


def test_the_quantile_is_linear_within_its_bin() -> None:
    counts = torch.stack([counts_of([0.5, 0.52, 0.54, 0.56, 3.0]), counts_of([-1.0] * 4), counts_of([0.5])])
    for share, expected in ((0.0, [0.5, -1.125]), (0.4, [0.53125, -1.125 + 0.05]), (1.0, [3.25, -1.0])):
        torch.testing.assert_close(quantile(counts, share)[:2], torch.tensor(expected))
        torch.testing.assert_close(quantile(counts, torch.tensor(share)), quantile(counts, share))
    by_expert = quantile(counts, torch.tensor([0.4, 1.0, 0.5]))
    torch.testing.assert_close(by_expert, torch.tensor([0.53125, -1.0, 0.53125]))
    layers = torch.stack([counts, counts * 3])
    torch.testing.assert_close(quantile(layers, 0.4), quantile(counts, 0.4).expand(2, 3))


def test_the_quantile_of_nothing_is_zero() -> None:
    assert quantile(torch.zeros(2, BINS, dtype=torch.int32), 0.3).tolist() == [0, 0]


SCORES, IDS, BIAS = torch.rand(3, 4), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: count_margins(BIAS, IDS, BIAS), ShapeError, r"scores has shape \(4,\)"),
        (lambda: count_margins(SCORES, IDS[:2], BIAS), ShapeError, r"expert_ids has shape \(2, 2\), must be \(3, top"),
        (lambda: count_margins(SCORES, IDS, BIAS[:3]), ShapeError, r"score_bias has shape \(3,\), must be \(4,\)"),
        (lambda: count_margins(SCORES, IDS, BIAS, IDS[0] > 0), ShapeError, r"token_mask has shape \(2,\), must be \(3"),
        (lambda: count_margins(SCORES.half(), IDS, BIAS), DtypeError, "scores has dtype torch.float16"),
        (lambda: count_margins(SCORES, IDS.long(), BIAS), DtypeError, "expert_ids has dtype torch.int64"),
        (lambda: count_margins(SCORES, IDS, BIAS.double()), DtypeError, "score_bias has dtype torch.float64"),
        (lambda: count_margins(SCORES, IDS, BIAS, BIAS[:3]), DtypeError, "token_mask has dtype torch.float32"),
        (lambda: count_margins(SCORES, IDS + 4, BIAS), ConfigError, r"values 4 .. 4, must be -1 .. E - 1 = 3"),
        (lambda: count_margins(SCORES, IDS - 2, BIAS), ConfigError, r"values -2 .. -2"),
        (lambda: quantile(IDS, 0.5), ShapeError, rf"counts has shape \(3, 2\), must be \(\.\.\., {BINS}\)"),
        (lambda: quantile(torch.zeros(4, BINS), 0.5), DtypeError, "counts has dtype torch.float32"),
        (lambda: quantile(torch.zeros(4, BINS).int(), 1.1), ConfigError, "share=1.1 must be between 0 and 1"),
    ],
)
def test_refuses(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
