"""The Triton kernels against the oracles, through the public functions.

Runs on a GPU, or on the CPU with each launch executed by Triton's semantics::

    python -m ttsem.sanitize pytest tests/kernels -m gpu
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe.kernels.combine import combine_rows
from moe.kernels.experts import run_experts
from moe.kernels.gather import gather_rows
from moe.kernels.grouped_mm import grouped_mm
from moe.kernels.plan import make_plan
from moe.types import Plan
from tests.support.kernels import (
    check_against_oracle,
    dense_combine,
    dense_gather,
    dense_grouped_mm,
    move,
    naive_plan,
    poison_unowned,
    poisoned_memory,
    random_ids,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def without_expert(ids: Tensor, expert: int) -> Tensor:
    return ids.masked_fill(ids == expert, 0)


ROUTINGS = {  # expert_ids, num_experts; 128 rows are a tile of the products, and a block of the plan
    "example": (torch.tensor([[0, 2], [1, 0], [3, -1]], dtype=torch.int32), 4),
    "ragged, expert 2 empty": (without_expert(random_ids(37, 3, 5), 2), 5),
    "all to the last": (torch.full((71, 2), 2, dtype=torch.int32), 3),
    "no expert at all": (torch.full((5, 2), -1, dtype=torch.int32), 3),
    "zero tokens": (torch.empty(0, 2, dtype=torch.int32), 3),
    "more experts than rows": (random_ids(4, 3, 64), 64),
}
# Features in and out: divisible by 16 elements (which Triton compiles apart) or not, and wider than a tile.
WIDTHS = {"example": (8, 5), "ragged, expert 2 empty": (33, 136), "all to the last": (64, 48)}
DEFAULT_WIDTHS = (16, 16)


def each_routing_and_dtype(test: Callable[..., None]) -> Callable[..., None]:
    by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
    return pytest.mark.parametrize("name", ROUTINGS)(by_dtype(test))


PLANS = {
    **ROUTINGS,
    "four blocks": (random_ids(167, 3, 7), 7),
    "1024 experts": (random_ids(60, 5, 1024), 1024),
    "one expert": (random_ids(100, 2, 1), 1),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(name: str) -> None:
    ids, num_experts = PLANS[name]
    expected = naive_plan(ids, num_experts)
    with poisoned_memory():
        plan = make_plan(ids.cuda(), num_experts)
    for field in ("assignments", "expert_offsets", "rows"):
        assert getattr(plan, field).dtype == torch.int32
        assert torch.equal(getattr(plan, field).cpu(), getattr(expected, field)), field


def test_plan_counts_an_id_out_of_range_as_no_expert() -> None:
    plan = make_plan(torch.tensor([[7, 1], [-3, 0]], dtype=torch.int32).cuda(), 2)
    assert plan.assignments.tolist() == [3, 1, 0, 2]
    assert plan.expert_offsets.tolist() == [0, 1, 2]
    assert plan.rows.tolist() == [[-1, 1], [-1, 0]]


@each_routing_and_dtype
def test_gather(name: str, dtype: torch.dtype) -> None:
    ids, num_experts = ROUTINGS[name]
    plan = naive_plan(ids, num_experts)
    check_gather(plan, WIDTHS.get(name, DEFAULT_WIDTHS)[0], dtype)


def check_gather(plan: Plan, dim: int, dtype: torch.dtype) -> None:
    on_gpu = move(plan, "cuda")
    check_against_oracle(
        lambda x: gather_rows(x, on_gpu),
        lambda x: dense_gather(x, plan),
        [torch.randn(plan.rows.shape[0], dim).to(dtype)],
        "cuda",
        poison_grad=lambda grad: poison_unowned(grad, plan),
    )


@each_routing_and_dtype
def test_combine(name: str, dtype: torch.dtype) -> None:
    ids, num_experts = ROUTINGS[name]
    check_combine(naive_plan(ids, num_experts), WIDTHS.get(name, DEFAULT_WIDTHS)[0], dtype)


def check_combine(plan: Plan, dim: int, dtype: torch.dtype) -> None:
    on_gpu = move(plan, "cuda")
    rows = poison_unowned(torch.randn(plan.assignments.shape[0], dim).to(dtype), plan)
    weights = torch.randn(plan.rows.shape).masked_fill(plan.rows < 0, float("nan"))
    check_against_oracle(
        lambda rows, weights: combine_rows(rows, weights, on_gpu),
        lambda rows, weights: dense_combine(rows, weights.masked_fill(plan.rows < 0, 0.0), plan),
        [rows, weights],
        "cuda",
    )


def test_rows_wider_than_a_block() -> None:
    plan = naive_plan(random_ids(3, 2, 2), 2)
    check_gather(plan, 1030, torch.float32)
    check_combine(plan, 1030, torch.float32)


@each_routing_and_dtype
def test_grouped_mm(name: str, dtype: torch.dtype) -> None:
    ids, num_experts = ROUTINGS[name]
    check_grouped_mm(naive_plan(ids, num_experts), *WIDTHS.get(name, DEFAULT_WIDTHS), dtype)


def check_grouped_mm(plan: Plan, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    offsets = plan.expert_offsets.cuda()
    rows = poison_unowned(torch.randn(plan.assignments.shape[0], num_in).to(dtype), plan)
    weight = torch.randn(plan.expert_offsets.shape[0] - 1, num_out, num_in).to(dtype)
    check_against_oracle(
        lambda rows, weight: grouped_mm(rows, weight, offsets),
        lambda rows, weight: dense_grouped_mm(rows, weight, plan.expert_offsets),
        [rows, weight],
        "cuda",
        poison_grad=lambda grad: poison_unowned(grad, plan),
    )


def every_second(values: Tensor) -> Tensor:
    """The same values with gaps of other numbers between them, along the last dimension."""
    return torch.stack([values, torch.full_like(values, 2)], -1)[..., 0]


def test_a_plan_with_gaps_in_memory_is_the_plan() -> None:
    ids = random_ids(9, 2, 3)
    plan = move(naive_plan(ids, 3), "cuda")
    gaps = Plan(*(every_second(part) for part in (plan.assignments, plan.expert_offsets, plan.rows)))
    assert not any(part.is_contiguous() for part in (gaps.assignments, gaps.expert_offsets, gaps.rows))
    x, weights = torch.randn(9, 16).cuda().requires_grad_(), torch.rand(9, 2).cuda()
    up, down = torch.randn(3, 32, 16).cuda().requires_grad_(), torch.randn(3, 16, 16).cuda()

    def run(plan: Plan) -> list[Tensor]:
        y = combine_rows(grouped_mm(gather_rows(x, plan), up, plan.expert_offsets), weights, plan)
        z = run_experts(x, weights, plan, up, down)
        return [y, z, *torch.autograd.grad(y.sum() + z.sum(), (x, up))]

    assert all(torch.equal(found, expected) for found, expected in zip(run(gaps), run(plan)))


def test_float32_products_are_not_rounded_to_tf32() -> None:
    rows = torch.full((1, 16), 1 + 2**-12).cuda()
    out = grouped_mm(rows, torch.ones(1, 16, 16).cuda(), torch.tensor([0, 1], dtype=torch.int32).cuda())
    assert out[0].tolist() == [16 + 2**-8] * 16  # TF32 has 10 bits after the point


def test_sums_best_expert_first() -> None:
    plan = move(naive_plan(torch.tensor([[2, 1, 0]], dtype=torch.int32), 3), "cuda")
    rows = torch.tensor([[1.0], [-1e8], [1e8]]).cuda()  # 1e8 - 1e8 + 1; in any other order float32 loses the one
    assert combine_rows(rows, torch.ones(1, 3).cuda(), plan).item() == 1


def test_repeats_to_the_last_bit() -> None:
    plan = move(naive_plan(random_ids(50, 3, 4), 4), "cuda")
    leaves = [
        torch.randn(shape, dtype=dtype).cuda().requires_grad_()
        for shape, dtype in (((50, 32), torch.bfloat16), ((4, 48, 32), torch.bfloat16), ((50, 3), torch.float32))
    ]

    def run() -> tuple[Tensor, ...]:
        x, weight, weights = leaves
        y = combine_rows(grouped_mm(gather_rows(x, plan), weight, plan.expert_offsets), weights, plan)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    assert all(torch.equal(first, second) for first, second in zip(run(), run()))
