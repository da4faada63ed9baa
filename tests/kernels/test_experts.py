"""The experts' operation on the CPU, through the public function."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.config import Activation
from moe.errors import DtypeError, ShapeError
from moe.kernels.experts import products, reference, run_experts
from moe.kernels.experts.rows import make_blocks
from moe.kernels.plan import make_plan
from tests.support.experts import GRADIENTS, Case, assert_close, make_case, ragged_case
from tests.support.kernels import poisoned_memory, random_ids, routings

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def leaves_of(case: Case) -> list[Tensor | None]:
    """Fresh leaves of the six differentiable inputs, in the order of GRADIENTS."""
    tensors = (getattr(case, name) for name in GRADIENTS)
    return [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]


def call(case: Case, leaves: list[Tensor | None], **options: Any) -> Tensor:
    x, weights, *parameters = leaves
    plan = make_plan(case.ids, case.num_experts)
    return run_experts(x, weights, plan, *parameters, activation=case.activation, **options)


def run(case: Case, **options: Any) -> list[Tensor]:
    """The output and the gradients of the inputs that are there, on memory poisoned with NaN."""
    leaves = leaves_of(case)
    with poisoned_memory():
        y = call(case, leaves, **options)
        return [y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], case.grad)]


def check(case: Case, **options: Any) -> None:
    y, *grads = run(case, **options)
    expected_y, expected_grads = case.oracle()
    assert y.dtype == case.x.dtype
    assert_close("y", y, expected_y, case.x.dtype)
    for name, grad, expected in zip(GRADIENTS, grads, expected_grads):
        assert_close(name, grad, expected, case.x.dtype)
    assert (grads[1][case.ids < 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", Activation)
def test_agrees_with_every_token_through_every_expert(activation: Activation, bias: bool, dtype: torch.dtype) -> None:
    check(ragged_case(activation=activation, bias=bias, dtype=dtype))


@pytest.fixture
def native_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision as on a CPU that has instructions for it: multiplied as it is."""
    monkeypatch.setattr(products, "product_dtype", lambda dtype: dtype)


@pytest.fixture
def converted_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision as on a CPU that has none."""
    wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
    monkeypatch.setattr(products, "product_dtype", lambda dtype: wide.get(dtype, dtype))


@pytest.mark.parametrize("kind", ["native_half", "converted_half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", Activation)
def test_half_precision_on_either_kind_of_cpu(
    request: pytest.FixtureRequest, activation: Activation, dtype: torch.dtype, kind: str
) -> None:
    request.getfixturevalue(kind)
    case = ragged_case(activation=activation, dtype=dtype)
    check(case)
    assert all(torch.equal(kept, again) for kept, again in zip(run(case), run(case, recompute_up=True)))


@given(routings(), st.sampled_from(Activation), st.booleans(), st.integers(1, 9), st.integers(1, 7))
@settings(max_examples=40)
def test_any_routing_and_any_width(
    routing: tuple[Tensor, int], activation: Activation, bias: bool, dim: int, hidden_dim: int
) -> None:
    options = {"activation": activation, "bias": bias, "dim": dim, "hidden_dim": hidden_dim}
    check(make_case(*routing, dtype=torch.float64, **options))


@pytest.mark.parametrize(
    "case",
    [
        make_case(torch.full((300, 2), 1, dtype=torch.int32), 3, dtype=torch.float32),
        make_case(torch.full((5, 2), -1, dtype=torch.int32), 3, dtype=torch.float32),
        make_case(torch.empty(0, 2, dtype=torch.int32), 3, dtype=torch.float32),
        make_case(random_ids(40, 64, 1024), 1024, dim=8, hidden_dim=4, dtype=torch.float32),
    ],
    ids=["all to one", "none", "zero tokens", "1024 experts, 64 choices"],
)
def test_extreme_loads(case: Case) -> None:
    check(case)


def test_blocks_hold_whole_experts_and_all_of_them_in_order() -> None:
    offsets = [0, 0, 100, 200, 300, 900, 900, 950, 950]
    blocks = make_blocks(offsets)
    assert [block.experts for block in blocks] == [range(3), range(3, 4), range(4, 5), range(5, 8)]
    assert [block.sizes for block in blocks] == [[0, 100, 100], [100], [600], [0, 50, 0]]
    assert [(block.rows.start, block.rows.stop) for block in blocks] == [(0, 200), (200, 300), (300, 900), (900, 950)]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("recompute_up", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("activation", Activation)
def test_gradients_against_finite_differences(activation: Activation, recompute_up: bool, bias: bool) -> None:
    case = make_case(
        torch.tensor([[0, 2], [1, 0], [2, -1]], dtype=torch.int32), 4, dim=3, hidden_dim=2, activation=activation,
        bias=bias, dtype=torch.float64,
    )  # fmt: skip
    case = replace(case, weights=case.weights.masked_fill(case.ids < 0, 0.5))  # no NaN: gradcheck adds to it
    leaves = [leaf for leaf in leaves_of(case) if leaf is not None]

    def function(*inputs: Tensor) -> Tensor:
        return call(case, list(inputs), recompute_up=recompute_up)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("recompute_up", [False, True], ids=["kept", "recomputed"])
def test_backward_keeps_the_input_the_routing_and_the_up_projection_only(recompute_up: bool) -> None:
    case = ragged_case(dtype=torch.bfloat16)
    leaves = leaves_of(case)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        call(case, leaves, recompute_up=recompute_up)
    given_in = {leaf.data_ptr() for leaf in leaves if leaf is not None}
    own = [tensor for tensor in kept if tensor.data_ptr() not in given_in and tensor.numel()]
    rows = case.ids.numel()
    plan = [(rows,), (case.num_experts + 1,), tuple(case.ids.shape)]
    up = [] if recompute_up else [(rows, 48)]
    assert sorted(tuple(tensor.shape) for tensor in own) == sorted(plan + up)


def test_keeps_no_up_projection_where_nothing_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    forward = reference.experts_forward

    def spy(*inputs: Any) -> tuple[Tensor, Tensor]:
        y, up = forward(*inputs)
        kept.append(up.shape[0] > 0)
        return y, up

    case = ragged_case(dtype=torch.float32)
    constant = [leaf.detach() for leaf in leaves_of(case) if leaf is not None]
    with torch.library._scoped_library("moe", "IMPL") as library:
        library.impl("experts", spy, "CPU", allow_override=True)
        call(case, leaves_of(case))
        call(case, constant)
        with torch.no_grad():
            call(case, leaves_of(case))
    assert kept == [True, False, False]


@pytest.mark.parametrize("wanted", GRADIENTS)
def test_one_gradient_alone_is_that_of_all_together(wanted: str) -> None:
    case = ragged_case(dtype=torch.float32)
    every = dict(zip(GRADIENTS, run(case)[1:]))
    leaves = [leaf.requires_grad_(name == wanted) for name, leaf in zip(GRADIENTS, leaves_of(case))]
    y = call(case, leaves)
    y.backward(case.grad)
    for name, leaf in zip(GRADIENTS, leaves):
        assert leaf.grad is None if name != wanted else torch.equal(leaf.grad, every[name]), name


@pytest.mark.parametrize("options", [{}, {"recompute_up": True}, {"batch_invariant": True}], ids=str)
def test_repeats_to_the_last_bit(options: dict[str, bool]) -> None:
    case = make_case(random_ids(200, 3, 6), 6, dim=64, hidden_dim=48, dtype=torch.float32)
    assert all(torch.equal(first, second) for first, second in zip(run(case, **options), run(case, **options)))


# 1103 wide, a block of rows is shared out among threads, in the middle of a row.
@pytest.mark.parametrize("sizes", [(33, 5), (64, 48), (7, 1103)], ids=str)
@pytest.mark.parametrize("activation", [Activation.SWIGLU, Activation.GELU, Activation.RELU_SQUARED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_batch_invariant_tokens_do_not_feel_each_other(
    dtype: torch.dtype, activation: Activation, sizes: tuple[int, int]
) -> None:
    dim, hidden_dim = sizes
    options = {"batch_invariant": True, "recompute_up": activation is Activation.GELU}
    whole = make_case(random_ids(151, 3, 4), 4, dim=dim, hidden_dim=hidden_dim, activation=activation, dtype=dtype)
    y, grad_x, grad_weights, *_ = run(whole, **options)
    for tokens in (slice(3, 4), slice(10, 77), slice(150, 151)):
        fields = {name: getattr(whole, name)[tokens] for name in ("ids", "x", "weights", "grad")}
        part_y, part_grad_x, part_grad_weights, *_ = run(replace(whole, **fields), **options)
        assert torch.equal(part_y, y[tokens])
        assert torch.equal(part_grad_x, grad_x[tokens])
        assert torch.equal(part_grad_weights, grad_weights[tokens])


def test_weight_gradients_in_float32_lose_nothing_over_micro_batches() -> None:
    case = ragged_case(dtype=torch.bfloat16, bias=True)
    leaves = leaves_of(case)
    for leaf in leaves[2:]:
        leaf.grad_dtype = torch.float32
    for _ in range(3):
        call(case, leaves, weight_grad_dtype=torch.float32).backward(case.grad)
    for name, leaf, expected in zip(GRADIENTS[2:], leaves[2:], case.oracle()[1][2:]):
        assert leaf.grad.dtype == torch.float32
        # The activation and its gradient were rounded to bfloat16 at most; the sum over three calls was not.
        assert_close(name, leaf.grad, 3 * expected, torch.bfloat16)
        rounded = leaf.grad.bfloat16().float()
        assert not torch.equal(rounded, leaf.grad), name


def test_any_strides() -> None:
    case = ragged_case(dtype=torch.float32)
    expected = run(case)
    leaves = leaves_of(case)
    strided = [leaf.transpose(0, -1).contiguous().transpose(0, -1) for leaf in leaves]
    assert not strided[0].is_contiguous()
    y = call(case, strided)
    found = [y, *torch.autograd.grad(y, leaves, case.grad.t().contiguous().t())]
    assert all(torch.equal(each, other) for each, other in zip(found, expected))


def test_wrong_inputs_are_named() -> None:
    case = ragged_case(dtype=torch.float32)

    def fails(error: type[Exception], message: str, **changes: Any) -> None:
        changed = replace(case, **changes)
        with pytest.raises(error, match=message):
            call(changed, [getattr(changed, name) for name in GRADIENTS])

    fails(DtypeError, "x has dtype torch.int64, must be floating point", x=case.x.long())
    fails(DtypeError, "up_weight has dtype torch.bfloat16, must be torch.float32", up_weight=case.up_weight.bfloat16())
    fails(DtypeError, "down_weight has dtype torch.int32", down_weight=case.down_weight.int())
    fails(DtypeError, "weights has dtype torch.bfloat16, must be torch.float32", weights=case.weights.bfloat16())
    fails(ShapeError, r"x has shape \(37, 32\), must be \(37, 33\)", x=case.x[:, :32])
    fails(ShapeError, r"up_weight has shape \(5, 47, 33\), must be \(5, 48, 33\)", up_weight=case.up_weight[:, :47])
    fails(ShapeError, r"down_bias has shape \(4, 33\)", down_bias=case.down_bias[:4])
    fails(ShapeError, r"down_weight has shape \(33, 24\), must be \(experts", down_weight=case.down_weight[0])
    fails(ShapeError, r"down_weight has 0 experts, shape \(0, 33, 24\)", down_weight=case.down_weight[:0])
    supported = "must be bfloat16, float16, float32 or float64"
    fails(DtypeError, f"x has dtype torch.float8_e4m3fn, {supported}", x=case.x.to(torch.float8_e4m3fn))


def test_offsets_that_do_not_fit_the_rows_are_an_error() -> None:
    case = ragged_case(dtype=torch.float32)
    plan = make_plan(case.ids, case.num_experts)
    parameters = (case.up_weight, case.down_weight, case.up_bias, case.down_bias)
    for offsets in ([0, 1, 2, 3, 4, 112], [1, 2, 3, 4, 5, 6], [0, 5, 4, 6, 7, 8]):
        broken = replace(plan, expert_offsets=torch.tensor(offsets, dtype=torch.int32))
        with pytest.raises(ShapeError, match="must start at 0 and ascend to at most 111"):
            run_experts(case.x, case.weights, broken, *parameters)
