"""Routing on the CPU: the documented examples, the definition, gradients in float64, and the argument checks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.errors import ConfigError, DtypeError, ShapeError
from moe.kernels.route import ScoreFunction, choose, route, weigh, weights_of
from moe.kernels.route.logits import router_logits
from moe.kernels.route.reference import CHUNK_KEYS, best_columns, search_best_columns
from tests.routing.oracle import Case, naive_ids, naive_weights
from tests.support.kernels import poisoned_memory

EXAMPLE = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 0.0, 0.0, 1.0]])


def test_the_documented_example() -> None:
    ids, weights, scores = route(EXAMPLE, 2, normalize=True)
    assert ids.tolist() == [[1, 3], [0, 3]]
    as_printed = {"rtol": 0, "atol": 0.0051}
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5], [0.88, 0.12]]), **as_printed)
    expected = torch.tensor([[0.05, 0.40, 0.15, 0.40], [0.81, 0.04, 0.04, 0.11]])
    torch.testing.assert_close(scores, expected, **as_printed)
    ids, weights, _ = route(EXAMPLE[:1], 2, normalize=True, score_bias=torch.tensor([0.0, 0.0, 0.5, 0.0]))
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.27, 0.73]]), **as_printed)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, num_groups))
    return Case(
        tokens=draw(st.integers(0, 12)),
        experts=num_groups * size,
        top_k=draw(st.integers(1, top_groups * size)),
        score_function=draw(st.sampled_from(list(ScoreFunction))),
        groups=(num_groups, top_groups) if num_groups > 1 else None,
        scale=draw(st.sampled_from([1.0, 2.5])),
        **{name: draw(st.booleans()) for name in ("normalize", "bias", "by_score", "masked", "ties")},
    )


@given(cases())
def test_decides_and_weighs_as_the_definition_does(case: Case) -> None:
    logits, bias, mask = case.tensors()
    with poisoned_memory():
        ids, weights, scores = route(logits, case.top_k, **case.options(), score_bias=bias, token_mask=mask)
    assert (ids.dtype, weights.dtype, scores.dtype) == (torch.int32, torch.float32, torch.float32)
    assert ids.tolist() == naive_ids(case, logits, scores, bias, mask)
    expected_weights, expected_scores = naive_weights(case, logits.double(), ids)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-5, atol=1e-6)
    again = weigh(logits, ids, **case.weighting())
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], scores)


@given(cases())
def test_what_can_be_traced_chooses_alike(case: Case) -> None:
    logits, bias, _ = case.tensors()
    scores = torch.sigmoid(logits)
    chosen = choose(logits, scores, bias, case.top_k, case.by_score, *(case.groups or (1, 1)))
    assert chosen.tolist() == naive_ids(case, logits, scores, bias)


@pytest.mark.parametrize("score_function", list(ScoreFunction))
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("parts", [slice(1, 2), slice(2, 3), slice(1, 3)], ids=["weights", "scores", "both"])
def test_gradients_in_float64(score_function: str, normalize: bool, parts: slice) -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, True])
    options = {"score_function": score_function, "normalize": normalize, "scale": 1.7}
    ids = route(logits, 3, **options, token_mask=mask)[0]
    assert torch.autograd.gradcheck(lambda x: route(x, 3, **options, token_mask=mask)[parts], logits)
    assert torch.autograd.gradcheck(lambda x: (None, *weigh(x, ids, **options))[parts], logits)


@given(cases())
def test_gradients_are_those_of_the_definition(case: Case) -> None:
    logits, bias, mask = case.tensors()
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    grads = torch.randn(case.tokens, case.top_k), torch.randn(logits.shape)
    with poisoned_memory():
        ids, *results = route(leaf, case.top_k, **case.options(), score_bias=bias, token_mask=mask)
        given = [grads[0].masked_fill(ids < 0, float("nan")), grads[1]]
        grad = torch.autograd.grad(results, leaf, given)[0]
    expected = naive_weights(case, exact, ids)
    oracle = torch.autograd.grad(expected, exact, [part.double() for part in grads])[0]
    torch.testing.assert_close(grad.double(), oracle, rtol=1e-5, atol=2e-5)


def test_chosen_scores_that_underflow_give_finite_weights_and_gradients() -> None:
    leaf = torch.tensor([[200.0, 0.0, 0.0, -1.0]], requires_grad=True)
    ids, weights, _ = route(leaf, 2, normalize=True, score_bias=torch.tensor([0.0, 0.0, 5.0, 5.0]))
    assert ids.tolist() == [[2, 3]]
    assert weights.tolist() == [[0, 0]]
    grad = torch.autograd.grad(weights, leaf, torch.full((1, 2), 1e30))[0]
    assert grad.tolist() == [[0, 0, 0, 0]]


@given(st.data())
def test_the_search_finds_what_the_sort_does(data: st.DataObject) -> None:
    value = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, float("inf"), -float("inf"), float("nan")])
    num_rows, num_columns = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 7))
    keys = torch.tensor(data.draw(st.lists(value, min_size=num_rows * num_columns, max_size=num_rows * num_columns)))
    keys = keys.view(num_rows, num_columns)
    k = data.draw(st.integers(1, num_columns))
    for dtype in (torch.float32, torch.float64):
        found = search_best_columns(keys.to(dtype), k)
        assert found.dtype == torch.int32
        assert torch.equal(found, best_columns(keys.to(dtype), k))


def test_the_search_goes_on_behind_the_first_chunk() -> None:
    keys = torch.randn(70, CHUNK_KEYS // 32)  # 32 rows a chunk, the last chunk is not full
    keys[40, 3:] = -float("inf")
    assert torch.equal(search_best_columns(keys, 5), best_columns(keys, 5))


def test_poisoned_tokens_get_distinct_experts_and_disturb_no_other() -> None:
    logits = torch.randn(4, 6)
    clean = route(logits, 3)
    logits[1], logits[2, 4] = float("nan"), float("nan")
    ids, weights, _ = route(logits, 3)
    assert ids[1].tolist() == [0, 1, 2]
    assert ids[2, 0] == 4
    assert len(set(ids[2].tolist())) == 3
    for row in (0, 3):
        assert torch.equal(ids[row], clean[0][row])
        assert torch.equal(weights[row], clean[1][row])


@pytest.mark.parametrize("score_function", list(ScoreFunction))
@pytest.mark.parametrize(("experts", "top_k"), [(5, 2), (24, 3), (100, 40)])
def test_a_token_is_routed_to_the_same_bits_in_every_batch(score_function: str, experts: int, top_k: int) -> None:
    logits, bias = torch.randn(150, experts), torch.randn(experts)
    options = {"score_function": score_function, "normalize": True, "score_bias": bias}
    whole = route(logits, top_k, **options)
    for part in (slice(0, 1), slice(7, 40), slice(149, 150)):
        alone = route(logits[part], top_k, **options)
        assert all(torch.equal(found, expected[part]) for found, expected in zip(alone, whole))


def test_takes_any_strides() -> None:
    logits, bias, mask = torch.randn(6, 18)[:, ::2], torch.randn(18)[::2], torch.tensor([True, False] * 6)[::2]
    copies = logits.contiguous(), bias.contiguous(), mask.contiguous()
    assert not logits.is_contiguous()
    found = route(logits, 2, score_bias=bias, token_mask=mask)
    assert all(map(torch.equal, found, route(copies[0], 2, score_bias=copies[1], token_mask=copies[2])))
    x, weight = torch.randn(8, 5).t(), torch.randn(8, 3).t()
    assert torch.equal(router_logits(x, weight), router_logits(x.contiguous(), weight.contiguous()))


def test_shapes_without_data() -> None:
    logits = router_logits(torch.empty(7, 16, device="meta", dtype=torch.bfloat16), torch.empty(4, 16, device="meta"))
    assert (logits.shape, logits.dtype) == ((7, 4), torch.float32)
    ids, weights, scores = route(logits, 2)
    assert (ids.shape, weights.shape, scores.shape, ids.dtype) == ((7, 2), (7, 2), (7, 4), torch.int32)
    assert [part.shape for part in weigh(logits, ids)] == [(7, 2), (7, 4)]


LOGITS = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: route(torch.zeros(8), 1), ShapeError, r"logits has shape \(8,\)"),
        (lambda: route(LOGITS.bfloat16(), 1), DtypeError, "bfloat16, must be torch.float32 or torch.float64"),
        (lambda: route(LOGITS, 0), ConfigError, "top_k=0 must be between 1 and the number of experts, 8"),
        (lambda: route(LOGITS, 9), ConfigError, "top_k=9"),
        (lambda: route(LOGITS, 1, score_function="relu"), ConfigError, "'relu' is unknown; choose one of softmax, sig"),
        (lambda: route(LOGITS, 1, score_bias=torch.zeros(7)), ShapeError, r"score_bias has shape \(7,\), must be \(8,"),
        (lambda: route(LOGITS, 1, score_bias=torch.zeros(8).half()), DtypeError, "score_bias has dtype torch.float16"),
        (lambda: route(LOGITS, 1, token_mask=torch.ones(2, dtype=torch.bool)), ShapeError, r"token_mask .* be \(3,\)"),
        (lambda: route(LOGITS, 1, token_mask=torch.ones(3)), DtypeError, "token_mask has dtype torch.float32"),
        (
            lambda: route(LOGITS, 1, num_groups=2),
            ConfigError,
            "num_groups=2 and top_groups=None must be given together",
        ),
        (lambda: route(LOGITS, 1, num_groups=3, top_groups=1), ConfigError, "num_groups=3 must divide num_experts=8"),
        (
            lambda: route(LOGITS, 1, num_groups=2, top_groups=3),
            ConfigError,
            "top_groups=3 must be at most num_groups=2",
        ),
        (lambda: route(LOGITS, 5, num_groups=2, top_groups=1), ConfigError, "top_k=5 is more than the 4 experts"),
        (
            lambda: weigh(LOGITS, torch.zeros(2, 1).int()),
            ShapeError,
            r"expert_ids has shape \(2, 1\), must be \(3, top",
        ),
        (lambda: weigh(LOGITS, torch.zeros(3, 1)), DtypeError, "expert_ids has dtype torch.float32"),
        (lambda: router_logits(LOGITS, torch.zeros(2, 7)), ShapeError, r"x has shape \(3, 8\) and weight \(2, 7\)"),
        (lambda: router_logits(LOGITS.int(), torch.zeros(2, 8)), DtypeError, "x has dtype torch.int32"),
        (lambda: router_logits(LOGITS, torch.zeros(2, 8).int()), DtypeError, "weight has dtype torch.int32"),
        (lambda: router_logits(LOGITS, torch.zeros(2, 8).double()), DtypeError, "float64 logits need float64 tokens"),
    ],
)
def test_refuses(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def exact_logits(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, grad = x.double(), weight.double(), grad.double()
    return x @ weight.t(), grad @ weight, grad.t() @ x


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 64, 700])  # 64 is a block, 512 a chunk
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_logits_of_half_precision_are_rounded_nowhere(
    batch_invariant: bool, tokens: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x, weight = torch.randn(tokens, 20).to(dtypes[0]), torch.randn(9, 20).to(dtypes[1])
    grad = torch.randn(tokens, 9)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16), poisoned_memory():
        logits = router_logits(*leaves, batch_invariant=batch_invariant)
    grads = torch.autograd.grad(logits, leaves, grad)
    expected = exact_logits(x.detach(), weight.detach(), grad)
    # Sums of 20 (for the weight, 700) products of size one in float32.
    torch.testing.assert_close(logits.double(), expected[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(grads[0].double(), expected[1], rtol=2**-8, atol=2e-5)
    torch.testing.assert_close(
        grads[1].double(), expected[2], rtol=2**-8 if dtypes[1] == dtypes[0] else 1e-5, atol=2e-4
    )


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_logits_in_float64(batch_invariant: bool) -> None:
    leaves = [torch.randn(size, 3, dtype=torch.float64, requires_grad=True) for size in (5, 4)]
    assert torch.autograd.gradcheck(lambda *leaves: router_logits(*leaves, batch_invariant=batch_invariant), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [5, 33, 64, 1000])  # of odd widths MKL multiplies the last rows of a block differently
@pytest.mark.parametrize("experts", [3, 64, 100])
def test_batch_invariant_logits_are_the_same_bits_at_every_place(dtype: torch.dtype, dim: int, experts: int) -> None:
    token, others = torch.randn(1, dim).to(dtype), torch.randn(130, dim).to(dtype)
    weight = torch.randn(experts, dim).to(dtype)
    alone = router_logits(token, weight, batch_invariant=True)
    for place in (*range(64), 100, 129):
        x = torch.cat([others[:place], token, others[place + 1 :]])
        assert torch.equal(router_logits(x, weight, batch_invariant=True)[place], alone[0]), place


def test_backward_of_the_logits_keeps_the_tokens_as_they_came() -> None:
    x = torch.randn(10, 16).bfloat16()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        router_logits(x, torch.randn(4, 16).bfloat16().requires_grad_())
    assert sorted(tensor.numel() * tensor.itemsize for tensor in kept) == [4 * 16 * 2, 10 * 16 * 2]


def test_repeats_to_the_last_bit() -> None:
    def run() -> tuple[Tensor, ...]:
        x, weight = (torch.randn(size, 48, generator=torch.Generator().manual_seed(size)) for size in (90, 12))
        leaves = x.requires_grad_(), weight.requires_grad_()
        ids, weights, scores = route(router_logits(*leaves), 3, normalize=True)
        return ids, weights, scores, *torch.autograd.grad((weights * scores[:, :3]).sum(), leaves)

    assert all(map(torch.equal, run(), run()))


def test_saturated_sigmoids_are_told_apart_by_their_logits_unless_scores_are_asked_for() -> None:
    logits = torch.tensor([[20.0, 30.0]])
    assert route(logits, 1, score_function="sigmoid")[0].item() == 1
    assert route(logits, 1, score_function="sigmoid", by_score=True)[0].item() == 0


def test_the_root_of_softplus_at_extreme_logits() -> None:
    leaf = torch.tensor([[-float("inf"), -200.0, -60.0, -1e-6, 60.0, 3e38, float("nan")]], requires_grad=True)
    exact = torch.tensor([[0.0, 0.0, math.exp(-30), math.log(2) ** 0.5, 60**0.5, 3e38**0.5, float("nan")]])
    slope = torch.tensor([[0.0, 0.0, math.exp(-30) / 2, 0.25 / math.log(2) ** 0.5, 0.5 / 60**0.5, 0.0, float("nan")]])
    for scores in (
        weigh(leaf, leaf.argsort().int(), score_function="sqrt_softplus")[1],
        ScoreFunction.SQRT_SOFTPLUS.of(leaf),
    ):
        torch.testing.assert_close(scores.detach(), exact, rtol=2e-6, atol=0, equal_nan=True)
        grad = torch.autograd.grad(scores, leaf, torch.ones_like(leaf))[0]
        torch.testing.assert_close(grad, slope, rtol=2e-6, atol=1e-19, equal_nan=True)


def test_a_sum_below_the_floor_has_the_gradient_of_the_floor() -> None:
    leaf = torch.tensor([[720.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2]], dtype=torch.int32)
    grad = torch.autograd.grad(weigh(leaf, ids, normalize=True)[0], leaf, torch.tensor([[1.0, 3.0]]).double())[0]
    expected = torch.autograd.grad(
        weights_of(leaf.softmax(-1), ids, True, 1.0), leaf, torch.tensor([[1.0, 3.0]]).double()
    )[0]
    assert expected[0, 1] > 0
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)
