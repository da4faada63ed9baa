"""The experts' operation on GPUs: its two functions and their kernels, called directly.

Runs on a GPU, or on the CPU with each launch executed by Triton's semantics::

    python -m ttsem.sanitize pytest tests/kernels -m gpu
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moe.config import Activation
from moe.kernels.experts import triton_backend
from moe.kernels.experts.triton_activation import activation_backward, activation_forward
from moe.kernels.experts.triton_backend import experts_backward, experts_forward
from tests.support.experts import GRADIENTS, Case, assert_close, make_case, ragged_case
from tests.support.kernels import move, naive_plan, poisoned_memory, random_ids, routings

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALL = [True] * len(GRADIENTS)


def run(
    case: Case, keep_up: bool = True, needs: list[bool] = ALL, weight_grad_dtype: torch.dtype | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The output and its six gradients on the GPU."""
    plan = move(naive_plan(case.ids, case.num_experts), "cuda")
    indices = (plan.assignments, plan.expert_offsets, plan.rows)
    parameters = (case.up_weight, case.down_weight, case.up_bias, case.down_bias)
    parameters = tuple(None if p is None else p.cuda() for p in parameters)
    inputs = (case.x.cuda(), case.weights.cuda(), *indices)
    with poisoned_memory():
        y, up = experts_forward(*inputs, *parameters, str(case.activation), keep_up, None, True)
        assert up.shape == (case.ids.numel() if keep_up else 0, case.up_weight.shape[1])
        grads = experts_backward(
            case.grad.cuda(), *inputs, up, *parameters, str(case.activation), needs, weight_grad_dtype, True
        )
    return y, list(grads)


def check(case: Case) -> None:
    """Compare y and every gradient with the oracle, on memory poisoned with NaN."""
    y, grads = run(case)
    expected_y, expected_grads = case.oracle()
    assert_close("y", y, expected_y, case.x.dtype)
    for name, grad, expected in zip(GRADIENTS, grads, expected_grads):
        assert_close(name, grad, expected, case.x.dtype)
        assert grad.dtype == (torch.float32 if name == "weights" else case.x.dtype), name
    assert (grads[1].cpu()[case.ids < 0] == 0).all()


def small_case(**options: Any) -> Case:
    return make_case(torch.tensor([[0, 2], [1, 0], [3, -1]], dtype=torch.int32), 4, **options)


def assert_same_bits(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    for name, first, second in zip(("y", *GRADIENTS), (one[0], *one[1]), (other[0], *other[1])):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("activation", "bias"),  # without one, gated and not: the bias does not meet the formula of the activation
    [*((activation, True) for activation in Activation), (Activation.SWIGLU, False), (Activation.RELU, False)],
)
def test_agrees_with_every_token_through_every_expert(activation: Activation, bias: bool, dtype: torch.dtype) -> None:
    check(ragged_case(activation=activation, bias=bias, dtype=dtype))


ROUTINGS = {
    "all to the last": (torch.full((71, 2), 2, dtype=torch.int32), 3),
    "no expert at all": (torch.full((5, 2), -1, dtype=torch.int32), 3),
    "zero tokens": (torch.empty(0, 2, dtype=torch.int32), 3),
    "more experts than rows": (random_ids(4, 3, 65), 65),
    "one expert": (random_ids(9, 1, 1), 1),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_agrees_for_any_share_of_rows(name: str) -> None:
    check(make_case(*ROUTINGS[name]))


# Few widths, because each is one more compilation of every kernel; other tests have the wide and the even ones.
@settings(max_examples=6)
@given(
    routing=routings(),
    dim=st.sampled_from([33, 5]),
    hidden_dim=st.sampled_from([24, 7]),
    activation=st.sampled_from([Activation.SWIGLU, Activation.RELU]),
)
def test_agrees_for_any_shape(routing: tuple[Tensor, int], dim: int, hidden_dim: int, activation: Activation) -> None:
    check(make_case(*routing, dim=dim, hidden_dim=hidden_dim, activation=activation))


# By activation and hidden_dim: whether a result of the activation's gradient may lie where its operand was.
IN_PLACE = {
    (Activation.SWIGLU, 48): True,
    (Activation.SWIGLU, 50): False,
    (Activation.RELU_SQUARED, 24): True,
}


@pytest.mark.parametrize(("activation", "hidden_dim"), IN_PLACE)
def test_an_up_projection_that_is_computed_again_gives_the_same_bits(
    activation: Activation, hidden_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[tuple[bool, bool]] = []

    def spy(up: Tensor, grad_hidden: Tensor, *others: Any) -> Tensor:
        *_, grad_up, weighted, _ = others
        shared.append((up.data_ptr() == grad_up.data_ptr(), grad_hidden.data_ptr() == weighted.data_ptr()))
        return activation_backward(up, grad_hidden, *others)

    monkeypatch.setattr(triton_backend, "activation_backward", spy)
    case = ragged_case(activation=activation, hidden_dim=hidden_dim)
    assert_same_bits(run(case, keep_up=True), run(case, keep_up=False))
    allowed = IN_PLACE[activation, hidden_dim]
    assert shared == [(False, allowed), (allowed, allowed)]


def test_repeats_to_the_last_bit() -> None:
    case = ragged_case()
    assert_same_bits(run(case), run(case))


def test_a_token_does_not_depend_on_its_batch() -> None:
    case = ragged_case()
    part = slice(20, 31)
    alone = replace(case, ids=case.ids[part], x=case.x[part], weights=case.weights[part], grad=case.grad[part])
    y, grads = run(case)
    y_alone, grads_alone = run(alone)
    assert torch.equal(y[part], y_alone)
    assert torch.equal(grads[0][part], grads_alone[0])
    assert torch.equal(grads[1][part], grads_alone[1])


def test_weight_gradients_in_float32_are_those_before_rounding() -> None:
    case = ragged_case()
    (y, rounded), (y_again, grads) = run(case), run(case, weight_grad_dtype=torch.float32)
    assert all(grad.dtype == torch.float32 for grad in grads[1:])
    assert_same_bits((y, rounded), (y_again, [grads[0], grads[1], *(grad.bfloat16() for grad in grads[2:])]))
    assert not torch.equal(grads[2], rounded[2].float())


def test_makes_only_the_gradients_that_are_needed() -> None:
    case = small_case()
    y, every = run(case)
    for i, _ in enumerate(GRADIENTS):
        needs = [i == j for j in range(len(GRADIENTS))]
        expected = [grad if need else grad.new_empty(0) for grad, need in zip(every, needs)]
        assert_same_bits((y, expected), run(case, needs=needs))


def test_without_biases_their_gradients_are_empty() -> None:
    _, grads = run(small_case(bias=False))
    assert [grad.numel() == 0 for grad in grads] == [False, False, False, False, True, True]


ACTIVATIONS = {  # PyTorch's own: right for the largest numbers too
    Activation.SWIGLU: lambda up: F.silu(up.chunk(2, -1)[0]) * up.chunk(2, -1)[1],
    Activation.GELU: F.gelu,
    Activation.RELU: F.relu,
    Activation.RELU_SQUARED: lambda up: F.relu(up) ** 2,
}


def activation_oracle(
    activation: Activation, up: Tensor, grad_hidden: Tensor, row_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: the activation, the gradient of ``up``, and the gradient of the routing weight without a bias."""
    leaf = up.double().requires_grad_()
    hidden = ACTIVATIONS[activation](leaf)
    (grad_up,) = torch.autograd.grad(hidden, leaf, row_weights.double()[:, None] * grad_hidden.double())
    return hidden.detach(), grad_up, (hidden.detach() * grad_hidden.double()).sum(1)


@pytest.mark.parametrize("hidden_dim", [260, 512])
@pytest.mark.parametrize("activation", Activation)
def test_the_activation_of_rows_wider_than_a_block(activation: Activation, hidden_dim: int) -> None:
    plan = naive_plan(random_ids(6, 2, 3), 3)
    owned = int(plan.expert_offsets[-1])
    assert 8 < owned < 12  # more than a tile of rows, and rows of no expert
    dim = 300
    up = torch.randn(12, hidden_dim * (2 if activation.is_gated else 1))
    grad_hidden, weights, grad, bias = (
        torch.randn(12, hidden_dim),
        torch.rand(6, 2),
        torch.randn(6, dim),
        torch.randn(3, dim),
    )
    of_row = weights.view(-1)[plan.assignments]
    expected, expected_grad, dots = activation_oracle(activation, up, grad_hidden, of_row)
    expert = torch.searchsorted(plan.expert_offsets[1:], torch.arange(owned), right=True)
    dots = dots[:owned] + (grad.double()[plan.assignments[:owned] // 2] * bias.double()[expert]).sum(1)
    expected_weights = torch.zeros(12, dtype=torch.float64).scatter_(0, plan.assignments[:owned].long(), dots)

    on_gpu = move(plan, "cuda")
    up, weighted, target = up.cuda(), torch.full_like(grad_hidden, 7.0).cuda(), torch.full_like(up, 7.0).cuda()
    with poisoned_memory():
        hidden = activation_forward(up, on_gpu.expert_offsets, str(activation))
        grad_weights = activation_backward(
            up, grad_hidden.cuda(), weights.cuda(), on_gpu.assignments, on_gpu.expert_offsets, grad.cuda(), bias.cuda(),
            target, weighted, str(activation),
        )  # fmt: skip
    for value, wanted in [
        (hidden[:owned], expected[:owned]),
        (weighted[:owned], (expected * of_row[:, None])[:owned]),
        (target[:owned], expected_grad[:owned]),
        (grad_weights.view(-1), expected_weights),
    ]:
        torch.testing.assert_close(value.cpu().double(), wanted, rtol=1e-5, atol=3e-5)
    assert (target[owned:] == 7).all()
    assert (weighted[owned:] == 7).all()


@pytest.mark.parametrize("activation", Activation)
def test_the_activation_of_extreme_numbers(activation: Activation) -> None:
    numbers = torch.tensor(
        [-1e30, -1e4, -200.0, -90.0, -6.0, -1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 6.0, 90.0, 1e4, float("nan")]
    )
    up = numbers[None] if not activation.is_gated else torch.cat([numbers, torch.ones_like(numbers)])[None]
    ones = torch.ones(1, 1)
    hidden, grad_up, _ = activation_oracle(activation, up, torch.ones(1, numbers.numel()), ones[0])
    offsets = torch.tensor([0, 1], dtype=torch.int32).cuda()
    target = torch.empty_like(up).cuda()
    value = activation_forward(up.cuda(), offsets, str(activation))
    grad_hidden = torch.ones(1, numbers.numel()).cuda()
    activation_backward(
        up.cuda(), grad_hidden, ones.cuda(), offsets[:1], offsets, ones.cuda(), None, target,
        torch.empty_like(grad_hidden), str(activation),
    )  # fmt: skip
    torch.testing.assert_close(value.cpu(), hidden.float(), rtol=2e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(target.cpu(), grad_up.float(), rtol=2e-6, atol=1e-6, equal_nan=True)
