"""The plan on the CPU against a naive sort, and its argument checks."""

import pytest
import torch
from hypothesis import given
from torch import Tensor

from moe.errors import ConfigError, DtypeError, ShapeError
from moe.kernels.plan import make_plan
from moe.types import Plan
from tests.support.kernels import naive_plan, poisoned_memory, random_ids, routings


def assert_same(plan: Plan, expected: Plan) -> None:
    for name in ("assignments", "expert_offsets", "rows"):
        value = getattr(plan, name)
        assert value.dtype == torch.int32
        assert torch.equal(value, getattr(expected, name)), name


def test_the_documented_example() -> None:
    plan = make_plan(torch.tensor([[0, 2], [1, 0], [3, -1]], dtype=torch.int32), 4)
    assert plan.assignments.tolist() == [0, 3, 2, 1, 4, 5]
    assert plan.expert_offsets.tolist() == [0, 2, 3, 4, 5]
    assert plan.rows.tolist() == [[0, 3], [2, 1], [4, -1]]


@given(routings())
def test_equals_the_naive_sort(routing: tuple[Tensor, int]) -> None:
    with poisoned_memory():
        plan = make_plan(*routing)
    assert_same(plan, naive_plan(*routing))


@given(routings())
def test_rows_are_the_inverse_of_assignments(routing: tuple[Tensor, int]) -> None:
    plan = make_plan(*routing)
    rows = plan.rows.view(-1).long()
    assigned = torch.arange(rows.numel())[rows >= 0]
    assert torch.equal(plan.assignments[rows[assigned]].long(), assigned)
    assert sorted(plan.assignments.tolist()) == list(range(rows.numel()))


@pytest.mark.parametrize("num_experts", [1024, 2**15 - 1, 2**15, 2**16 + 1])  # around the ends of the 16-bit keys
def test_many_experts(num_experts: int) -> None:
    ids = random_ids(40, 3, num_experts)
    ids[5, 1], ids[6, 0] = num_experts - 1, -1
    plan = make_plan(ids, num_experts)
    assert_same(plan, naive_plan_of_few(ids, num_experts))


def naive_plan_of_few(ids: Tensor, num_experts: int) -> Plan:
    """The naive plan, for ids so sparse that looking for every expert would take too long."""
    used, dense = torch.unique(torch.where(ids < 0, num_experts, ids), return_inverse=True)
    is_none = ids < 0
    plan = naive_plan(dense.int().masked_fill(is_none, -1), len(used))
    offsets = torch.searchsorted(ids[~is_none].sort().values, torch.arange(num_experts + 1, dtype=torch.int32))
    return Plan(plan.assignments, offsets.int(), plan.rows)


def test_takes_any_strides() -> None:
    ids = random_ids(9, 6, 4)
    assert not ids[:, ::2].is_contiguous()
    assert_same(make_plan(ids[:, ::2], 4), naive_plan(ids[:, ::2], 4))


def test_shapes_without_data() -> None:
    plan = make_plan(torch.empty(7, 2, dtype=torch.int32, device="meta"), 4)
    assert (plan.assignments.shape, plan.expert_offsets.shape, plan.rows.shape) == ((14,), (5,), (7, 2))


@pytest.mark.parametrize(
    ("ids", "num_experts", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int32), 4, ShapeError, r"expert_ids has shape \(3,\)"),
        (torch.zeros(3, 0, dtype=torch.int32), 4, ShapeError, "top_k > 0"),
        (torch.empty(2**30, 2, dtype=torch.int32, device="meta"), 4, ShapeError, "less than 2\\^31"),
        (torch.zeros(3, 2, dtype=torch.int64), 4, DtypeError, "torch.int64, must be int32"),
        (torch.zeros(3, 2, dtype=torch.int32), 0, ConfigError, "num_experts=0 must be at least 1"),
        (torch.tensor([[0, 4]], dtype=torch.int32), 4, ConfigError, "values 0 .. 4, must be -1 .. num_experts - 1 = 3"),
        (torch.tensor([[-2, 1]], dtype=torch.int32), 4, ConfigError, "values -2 .. 1"),
    ],
)
def test_refuses(ids: Tensor, num_experts: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_plan(ids, num_experts)
