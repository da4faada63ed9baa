"""Gathering on the CPU against a one-hot product, value and gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.errors import DtypeError, ShapeError
from moe.kernels.gather import gather_rows
from moe.kernels.plan import make_plan
from tests.support.kernels import check_against_oracle, dense_gather, poison_unowned, random_ids, routings

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@given(routings(), st.integers(1, 9), st.sampled_from(DTYPES))
def test_against_the_oracle(routing: tuple[Tensor, int], dim: int, dtype: torch.dtype) -> None:
    plan = make_plan(*routing)
    check_against_oracle(
        lambda x: gather_rows(x, plan),
        lambda x: dense_gather(x, plan),
        [torch.randn(plan.rows.shape[0], dim).to(dtype)],
        "cpu",
        poison_grad=lambda grad: poison_unowned(grad, plan),
    )


def test_the_documented_example() -> None:
    plan = make_plan(torch.tensor([[0, 2], [1, 0], [3, -1]], dtype=torch.int32), 4)
    x = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    rows = gather_rows(x, plan)
    assert rows.flatten().tolist() == [1, 2, 2, 1, 4, 4]
    rows.backward(torch.tensor([[1.0], [10.0], [100.0], [1000.0], [10000.0], [float("nan")]]))
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1001, 110, 10000]


def test_gradient_in_float64() -> None:
    plan = make_plan(random_ids(6, 3, 4), 4)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    # Rows of no expert are copies whose gradient is dropped, so the check looks at the others only.
    owned = int(plan.expert_offsets[-1])
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, plan)[:owned], x)


def test_gradient_is_accumulated_in_float32() -> None:
    plan = make_plan(torch.zeros(1, 3, dtype=torch.int32), 1)
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    # In bfloat16 256 + 1 is 256, so adding one by one would lose both ones.
    gather_rows(x, plan).backward(torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert x.grad is not None
    assert x.grad.item() == 258


def test_takes_any_strides() -> None:
    plan = make_plan(random_ids(4, 2, 3), 3)
    x = torch.randn(5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(gather_rows(x.t(), plan).sum(), x)  # sum's gradient has strides of zero
    assert torch.equal(gather_rows(x.t(), plan), gather_rows(x.t().contiguous(), plan))
    assert torch.equal(grad, (plan.rows >= 0).sum(1).float().expand(5, 4))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3), ShapeError, r"x has shape \(3,\)"),
        (torch.zeros(5, 4), ShapeError, r"x has shape \(5, 4\), must be \(tokens, dim\) with tokens=4"),
        (torch.zeros(4, 4, dtype=torch.int32), DtypeError, "x has dtype torch.int32, must be floating point"),
    ],
)
def test_refuses(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gather_rows(x, make_plan(random_ids(4, 2, 3), 3))
