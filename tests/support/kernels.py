"""What the kernel tests share: a naive oracle of each op in float64, routings to try, and the comparison.

The oracles are written from the definitions alone: loops over (expert, token, choice) and dense 0/1 matrices.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from hypothesis import strategies as st
from torch import Tensor

from moe.types import Plan

# By dtype of the result. Inputs are rounded before both sides see them, and every op keeps its sums in float32 at
# least, so a half-precision result is off by one rounding: 2^-9 (bfloat16), 2^-12 (float16), doubled for safety.
# Sums of about 100 products of size one lose less than 100 * 2^-24 = 6e-6 in float32, which is also the absolute part.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.float16: {"rtol": 2**-10, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-5},
}


MARGIN_EDGES = [0.0, *(2.0**exponent * (1 + eighth / 8) for exponent in range(-20, 4) for eighth in range(8))]
"""Where the bins of margins from 0 on begin; those below 0 mirror them."""


def naive_bin(margin: float) -> int:
    size = bisect_right(MARGIN_EDGES, abs(margin)) - 1
    return len(MARGIN_EDGES) + (size if margin >= 0 else -1 - size)


def naive_margin_counts(scores: Tensor, expert_ids: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """``(E, bins)`` from the definition, by a loop over tokens and experts."""
    counts = torch.zeros(scores.shape[1], 2 * len(MARGIN_EDGES), dtype=torch.int32)
    for token in range(scores.shape[0]):
        biased = scores[token].float() + bias
        chosen = {expert for expert in expert_ids[token].tolist() if expert >= 0}
        best = max((value for e, value in enumerate(biased) if e not in chosen), default=math.inf)
        worst = min((value for e, value in enumerate(biased) if e in chosen), default=math.inf)
        unmasked = mask is None or bool(mask[token])
        if unmasked and not biased.isnan().any() and abs(best) < math.inf and abs(worst) < math.inf:
            for expert, value in enumerate(biased):
                margin = (best if expert in chosen else worst) - value
                counts[expert, naive_bin(margin.item())] += 1
    return counts


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, memory that nobody has written holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def random_ids(tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Tensor:
    """Random choices with about one in ``num_experts + 1`` that is no expert."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, num_experts, (tokens, top_k), generator=generator, dtype=torch.int32)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """``expert_ids (T, K)`` with any -1s and empty experts, often none at all or all for one; and E."""
    tokens, top_k, num_experts = draw(st.integers(0, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    one = st.integers(-1, num_experts - 1)
    every = one.map(lambda expert: [expert] * (tokens * top_k))
    ids = draw(every | st.lists(one, min_size=tokens * top_k, max_size=tokens * top_k))
    return torch.tensor(ids, dtype=torch.int32).view(tokens, top_k), num_experts


def naive_plan(expert_ids: Tensor, num_experts: int) -> Plan:
    """The plan by looking through all assignments once an expert; on the CPU."""
    flat = expert_ids.reshape(-1).tolist()
    groups = [[i for i, expert in enumerate(flat) if expert == wanted] for wanted in (*range(num_experts), -1)]
    assignments = [i for group in groups for i in group]
    offsets = [sum(map(len, groups[:e])) for e in range(num_experts + 1)]
    rows = [assignments.index(i) if expert >= 0 else -1 for i, expert in enumerate(flat)]
    as_int = {"dtype": torch.int32, "device": "cpu"}
    return Plan(
        assignments=torch.tensor(assignments, **as_int),
        expert_offsets=torch.tensor(offsets, **as_int),
        rows=torch.tensor(rows, **as_int).view_as(expert_ids),
    )


def move(plan: Plan, device: str) -> Plan:
    return Plan(plan.assignments.to(device), plan.expert_offsets.to(device), plan.rows.to(device))


def owned_rows(plan: Plan) -> Tensor:
    """``(N,)`` bool: the rows that belong to an expert."""
    return torch.arange(plan.assignments.shape[0]) < plan.expert_offsets[-1]


def poison_unowned(rows: Tensor, plan: Plan) -> Tensor:
    """Put NaN where an op must not look."""
    return rows.masked_fill(~owned_rows(plan)[:, None], float("nan"))


def dense_gather(x: Tensor, plan: Plan) -> Tensor:
    """``(N, T)`` one-hot of each row's token, times ``x``; rows of no expert carry no gradient."""
    token = plan.assignments.long() // plan.rows.shape[1]
    rows = (token[:, None] == torch.arange(x.shape[0])).double() @ x
    return torch.where(owned_rows(plan)[:, None], rows, rows.detach())


def dense_combine(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """``(T, K, N)`` one-hot of each choice's row, weighted and summed over K, times ``rows``."""
    is_row = (plan.rows.long()[:, :, None] == torch.arange(rows.shape[0])).double()
    return (is_row * weights[:, :, None]).sum(1) @ torch.where(owned_rows(plan)[:, None], rows, 0.0)


def dense_grouped_mm(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """Every row times every expert's matrix, masked by ``(N, E)`` membership."""
    position = torch.arange(rows.shape[0])[:, None]
    member = ((position >= expert_offsets[:-1]) & (position < expert_offsets[1:])).double()
    clean = torch.where(position < expert_offsets[-1], rows, 0.0)
    return torch.einsum("ne,eoi,ni->no", member, weight, clean)


def check_against_oracle(
    op: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    device: str,
    poison_grad: Callable[[Tensor], Tensor] = lambda grad: grad,
) -> None:
    """Compare an op's value and the gradient of every input with the oracle's, on memory poisoned with NaN.

    Args:
        op: takes the inputs on ``device``.
        oracle: takes the inputs on the CPU in float64.
        inputs: on the CPU, in the dtypes the op shall run in.
        device: where the op runs.
        poison_grad: puts NaN into those places of the output's gradient that the op must not read.
    """
    leaves = [tensor.detach().to(device).requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = oracle(*exact)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
    with poisoned_memory():
        value = op(*leaves)
        grads = torch.autograd.grad(value, leaves, poison_grad(grad).to(device))
    assert value.dtype == inputs[0].dtype
    results = [value, *grads]
    references = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for result, reference in zip(results, references):
        torch.testing.assert_close(result.detach().cpu().double(), reference.detach(), **TOLERANCE[result.dtype])
