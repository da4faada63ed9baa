"""Combining on the CPU against a dense weighted one-hot product, value and both gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.errors import DtypeError, ShapeError
from moe.kernels.combine import combine_rows
from moe.kernels.combine.reference import CHUNK_ROWS, CHUNK_TOKENS
from moe.kernels.plan import make_plan
from moe.types import Plan
from tests.support.kernels import check_against_oracle, dense_combine, poison_unowned, random_ids, routings

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make_inputs(plan: Plan, dim: int, dtype: torch.dtype) -> list[Tensor]:
    rows = poison_unowned(torch.randn(plan.assignments.shape[0], dim).to(dtype), plan)
    return [rows, torch.randn(plan.rows.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)]


def check(plan: Plan, dim: int, dtype: torch.dtype) -> None:
    check_against_oracle(
        lambda rows, weights: combine_rows(rows, weights, plan),
        lambda rows, weights: dense_combine(rows, weights, plan),
        make_inputs(plan, dim, dtype),
        "cpu",
    )


@given(routings(), st.integers(1, 9), st.sampled_from(DTYPES))
def test_against_the_oracle(routing: tuple[Tensor, int], dim: int, dtype: torch.dtype) -> None:
    check(make_plan(*routing), dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_a_chunk(dtype: torch.dtype) -> None:
    tokens = max(CHUNK_TOKENS, CHUNK_ROWS // 3) + 5
    check(make_plan(random_ids(tokens, 4, 4), 4), 3, dtype)


def test_sums_best_expert_first() -> None:
    plan = make_plan(torch.tensor([[2, 1, 0]], dtype=torch.int32), 3)
    rows = torch.tensor([[1.0], [-1e8], [1e8]])  # 1e8 - 1e8 + 1; in any other order float32 loses the one
    assert combine_rows(rows, torch.ones(1, 3), plan).item() == 1


def test_gradient_in_float64() -> None:
    plan = make_plan(random_ids(6, 3, 4), 4)
    rows = torch.randn(18, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows, weights: combine_rows(rows, weights, plan), (rows, weights))


def test_what_no_expert_owns_gets_exactly_zero() -> None:
    plan = make_plan(torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32), 2)
    rows = torch.full((4, 3), float("nan"))
    rows[0] = 2.0
    weights = torch.full((2, 2), float("nan"))  # a weight of no expert is not read either
    weights[0, 0] = 0.5
    rows.requires_grad_()
    weights.requires_grad_()
    y = combine_rows(rows, weights, plan)
    assert y.tolist() == [[1.0] * 3, [0.0] * 3]
    y.backward(torch.tensor([[1.0] * 3, [float("inf")] * 3]))
    assert rows.grad is not None
    assert weights.grad is not None
    assert rows.grad.tolist() == [[0.5] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3]
    assert weights.grad.tolist() == [[6.0, 0.0], [0.0, 0.0]]


def test_sum_is_kept_in_float32() -> None:
    plan = make_plan(torch.zeros(1, 3, dtype=torch.int32), 1)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    assert combine_rows(rows, torch.ones(1, 3), plan).item() == 258


def test_repeats_to_the_last_bit() -> None:
    plan = make_plan(random_ids(200, 4, 8), 8)
    rows = torch.randn(800, 32, requires_grad=True)
    weights = torch.rand(200, 4, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        y = combine_rows(rows, weights, plan)
        return y, *torch.autograd.grad(y, (rows, weights), torch.ones_like(y))

    assert all(torch.equal(first, second) for first, second in zip(run(), run()))


@pytest.mark.parametrize(
    ("rows", "weights", "error", "message"),
    [
        (torch.zeros(8), torch.zeros(4, 2), ShapeError, r"rows has shape \(8,\)"),
        (torch.zeros(7, 3), torch.zeros(4, 2), ShapeError, r"must be \(rows, dim\), rows=8"),
        (torch.zeros(8, 3), torch.zeros(4, 3), ShapeError, r"weights has shape \(4, 3\), must be \(4, 2\)"),
        (torch.zeros(8, 3).int(), torch.zeros(4, 2), DtypeError, "rows has dtype torch.int32"),
        (torch.zeros(8, 3).bfloat16(), torch.zeros(4, 2).bfloat16(), DtypeError, "weights has dtype torch.bfloat16"),
        (torch.zeros(8, 3).double(), torch.zeros(4, 2), DtypeError, "must be torch.float64"),
    ],
)
def test_refuses(rows: Tensor, weights: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        combine_rows(rows, weights, make_plan(random_ids(4, 2, 3), 3))
