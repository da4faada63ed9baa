"""The routing kernels, written for a GPU: against the reference, the definition, and memory poisoned with NaN."""

from itertools import product

import pytest
import torch
from torch import Tensor

from moe.kernels.route import reference, route, weigh
from moe.kernels.route.logits import router_logits
from moe.kernels.route.logits.triton_backend import SPLIT_TOKENS
from tests.routing.oracle import Case, naive_ids, naive_weights
from tests.support.kernels import TOLERANCE, poisoned_memory

pytestmark = pytest.mark.gpu

CASES = [
    Case(7, 5, 1, normalize=False),
    Case(70, 5, 2, "sigmoid", scale=2.5, masked=True),
    Case(33, 33, 8),
    Case(33, 33, 33, "sigmoid", normalize=False),
    Case(9, 128, 8, "sigmoid", bias=True, groups=(8, 4)),
    Case(9, 128, 8),
    Case(5, 1024, 64, "sigmoid", bias=True),
    Case(5, 1024, 64, masked=True),
    Case(33, 33, 8, "sqrt_softplus", normalize=False, masked=True),
    Case(9, 128, 8, "sqrt_softplus", bias=True),
    Case(5, 1, 1, normalize=False),
    Case(20, 12, 3, ties=True),
    Case(20, 12, 3, "sigmoid", ties=True, bias=True, groups=(3, 2)),
    Case(20, 12, 3, "sqrt_softplus", ties=True, bias=True, groups=(3, 2)),
    Case(20, 20, 4, ties=True, groups=(5, 2)),
    Case(20, 6, 2, groups=(6, 3), masked=True),  # groups of one expert
    Case(20, 8, 1, normalize=False, by_score=True, ties=True),
    Case(0, 8, 2),
]


def cuda(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decides_and_weighs_as_the_definition_does(case: Case) -> None:
    logits, bias, mask = case.tensors()
    device_logits, device_bias, device_mask = cuda(logits, bias, mask)
    with poisoned_memory():
        ids, weights, scores = route(
            device_logits, case.top_k, **case.options(), score_bias=device_bias, token_mask=device_mask
        )
    assert (ids.dtype, weights.dtype, scores.dtype) == (torch.int32, torch.float32, torch.float32)
    # Ties of scores depend on the last bit of an exponential, so the definition is given the kernel's own scores.
    assert ids.tolist() == naive_ids(case, logits, scores.cpu(), bias, mask)
    expected_weights, expected_scores = naive_weights(case, logits.double(), ids.cpu())
    torch.testing.assert_close(scores.cpu().double(), expected_scores, **TOLERANCE[torch.float32])
    torch.testing.assert_close(weights.cpu().double(), expected_weights, **TOLERANCE[torch.float32])
    with poisoned_memory():
        again = weigh(device_logits, ids, **case.weighting())
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], scores)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("of", ["weights", "scores", "both"])
def test_gradients_are_those_of_the_definition(case: Case, of: str) -> None:
    logits, bias, mask = case.tensors()
    leaf = logits.cuda().requires_grad_()
    exact = logits.double().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(case.tokens, case.top_k, generator=generator), torch.randn(logits.shape, generator=generator)
    parts = {"weights": [0], "scores": [1], "both": [0, 1]}[of]
    device_bias, device_mask = cuda(bias, mask)
    with poisoned_memory():
        ids, *results = route(leaf, case.top_k, **case.options(), score_bias=device_bias, token_mask=device_mask)
        # What has no expert has no gradient either, whatever stands there.
        given = [grads[0].masked_fill(ids.cpu() < 0, float("nan")), grads[1]]
        grad = torch.autograd.grad([results[i] for i in parts], leaf, [given[i].cuda() for i in parts])[0]
        replayed = weigh(leaf, ids, **case.weighting())
        same = torch.autograd.grad([replayed[i] for i in parts], leaf, [given[i].cuda() for i in parts])[0]
    expected = naive_weights(case, exact, ids.cpu())
    oracle = torch.autograd.grad([expected[i] for i in parts], exact, [grads[i].double() for i in parts])[0]
    torch.testing.assert_close(grad.cpu().double(), oracle, **TOLERANCE[torch.float32])
    assert torch.equal(same, grad)


@pytest.mark.parametrize("score_function", ["sigmoid", "sqrt_softplus"])
def test_agrees_with_the_reference_on_every_kind_of_float(score_function: str) -> None:
    special = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45, 1e38, -1.0, -3e-6, -9.0]
    )
    generator = torch.Generator().manual_seed(0)
    logits = special[torch.randint(0, len(special), (40, 11), generator=generator)]
    for top_k in (3, 11):
        leaf = logits.cuda().requires_grad_()
        ids, _, scores = route(leaf, top_k, score_function=score_function)
        grad = torch.autograd.grad(scores, leaf, torch.ones_like(scores))[0]
        # By name: where ttsem stands in for a GPU, it has every tensor say that it is on one.
        expected = reference.route(logits, None, None, None, top_k, score_function, False, False, 1.0, 1, 1)
        expected_grad = reference.route_backward(
            None, torch.ones(40, 11), expected[2], expected[0], score_function, False, 1.0
        )
        assert torch.equal(ids.cpu(), expected[0])
        for found, wanted in ((scores, expected[2]), (grad, expected_grad)):
            torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_nothing_but_padding() -> None:
    leaf = torch.randn(9, 6).cuda().requires_grad_()
    with poisoned_memory():
        ids, weights, _ = route(leaf, 2, normalize=True, token_mask=torch.zeros(9, dtype=torch.bool).cuda())
        grad = torch.autograd.grad(weights, leaf, torch.full((9, 2), float("nan")).cuda())[0]
    assert (ids == -1).all()
    assert (weights == 0).all()
    assert (grad == 0).all()


def test_chosen_scores_that_underflow_give_finite_weights_and_gradients() -> None:
    leaf = torch.tensor([[200.0, 0.0, 0.0, -1.0]]).cuda().requires_grad_()
    bias = torch.tensor([0.0, 0.0, 5.0, 5.0]).cuda()
    ids, weights, _ = route(leaf, 2, normalize=True, score_bias=bias)
    assert ids.tolist() == [[2, 3]]
    assert weights.tolist() == [[0, 0]]
    grad = torch.autograd.grad(weights, leaf, torch.full((1, 2), 1e30).cuda())[0]
    assert grad.tolist() == [[0, 0, 0, 0]]


def test_repeats_to_the_last_bit_and_whatever_else_is_in_the_batch() -> None:
    case = Case(70, 33, 4, "sigmoid", bias=True)
    logits, bias, _ = cuda(*case.tensors())

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        leaf = rows.clone().requires_grad_()
        ids, weights, scores = route(leaf, 4, **case.options(), score_bias=bias)
        return ids, weights, scores, torch.autograd.grad(weights, leaf, torch.ones_like(weights))[0]

    whole = run(logits)
    assert all(map(torch.equal, whole, run(logits)))
    assert all(map(torch.equal, [part[61:] for part in whole], run(logits[61:])))


HALF_OR_SINGLE = [torch.bfloat16, torch.float16, torch.float32]
PAIRS = list(product(HALF_OR_SINGLE, HALF_OR_SINGLE))
SHAPES = [(9, 100, 130), (65, 64, 16), (0, 8, 4), (3, 1, 1)]  # tokens, dim, experts


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [*((shape, (torch.bfloat16, torch.bfloat16)) for shape in SHAPES), *(((70, 37, 9), pair) for pair in PAIRS)],
    ids=str,
)
def test_logits_and_their_gradients(shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    tokens, dim, experts = shape
    x, weight = (torch.randn(rows, dim).to(dtype) for rows, dtype in zip((tokens, experts), dtypes))
    grad = torch.randn(tokens, experts)
    leaves = [tensor.cuda().requires_grad_() for tensor in (x, weight)]
    with poisoned_memory():
        logits = router_logits(*leaves)
        grads = torch.autograd.grad(logits, leaves, grad.cuda())
    exact = x.double() @ weight.double().T, grad.double() @ weight.double(), grad.double().T @ x.double()
    for result, expected, dtype in zip((logits, *grads), exact, (torch.float32, *dtypes)):
        assert result.dtype == dtype
        torch.testing.assert_close(result.cpu().double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_rounded_to_fewer_bits_than_float32_has(dtype: torch.dtype) -> None:
    """TF32 has 10 bits after the point, bfloat16 has 7; only one product of each sum is not zero."""
    one, odd = torch.zeros(16, 16), 1 + 2**-23
    one[0, 0] = 1
    half, single = one.to(dtype).cuda().requires_grad_(), (one * odd).cuda().requires_grad_()
    for x, weight in ((half, single), (single, half)):
        logits = router_logits(x, weight)
        assert logits[0, 0].item() == odd
        exact = torch.autograd.grad(logits, single, (one * 3).cuda())[0]
        assert exact[0, 0].item() == 3
    weight = half.detach().float().requires_grad_()
    exact = torch.autograd.grad(router_logits(half, weight), weight, (one * odd).cuda())[0]
    assert exact[0, 0].item() == odd


def test_infinite_numbers_beside_halves_stay_infinite() -> None:
    infinite = torch.randn(16, 16)
    infinite[3, 2], infinite[5, 7], infinite[6, 0] = float("inf"), -float("inf"), float("nan")
    infinite[9, 9] = 3.4e38  # rounds to an infinite bfloat16
    half = torch.randn(16, 16).bfloat16()
    for x, weight in ((infinite, half), (half, infinite)):
        found = router_logits(x.cuda(), weight.cuda()).cpu()
        expected = x.double() @ weight.double().T
        expected = expected.float().where(expected.abs() < 1e37, expected * float("inf")).float()
        torch.testing.assert_close(found, expected, **TOLERANCE[torch.float32], equal_nan=True)


def test_gradients_of_many_tokens_are_split_into_ranges() -> None:
    tokens = SPLIT_TOKENS * 2 + 40
    x, grad = torch.randn(tokens, 16), torch.randn(tokens, 4)
    weight = torch.randn(4, 16).cuda().requires_grad_()
    with poisoned_memory():
        found = torch.autograd.grad(router_logits(x.cuda(), weight), weight, grad.cuda())[0]
    # 2,088 products of size one, so a larger sum than the tolerance's 100.
    torch.testing.assert_close(found.cpu().double(), grad.double().T @ x.double(), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
def test_logits_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(150, 40).to(dtype).cuda(), torch.randn(20, 40).to(dtype).cuda()
    whole = router_logits(x, weight)
    assert torch.equal(router_logits(x[131:149], weight), whole[131:149])
    assert torch.equal(router_logits(x, weight), whole)
