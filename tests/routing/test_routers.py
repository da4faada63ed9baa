"""Routers: the formulas, exact ties, float32 in every dtype, and what a user can get wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import ConfigError
from moe.routing import ROUTERS, SigmoidRouter, SoftmaxRouter, SwitchRouter
from tests.routing.zoo import TOP_K_IN_EVALUATION, ids_of
from tests.routing.zoo import build as make

MULTI = ("softmax", "top_k_softmax", "sigmoid", "sqrt_softplus")


def route_tokens(router_logits):
    """Section 7 of the source document, to the letter."""
    probs = torch.softmax(router_logits, dim=-1)
    experts = torch.argmax(probs, dim=-1)
    return experts  # noqa: RET504 (the document's own line)


def test_switch_is_the_source_documents_router():
    router = make("switch", dim=16, num_experts=8)
    x = torch.randn(500, 16)
    routing = router(x)
    logits = x @ router.weight.T
    assert torch.equal(routing.expert_ids[:, 0], route_tokens(logits).int())
    torch.testing.assert_close(routing.weights[:, 0], torch.softmax(logits, -1).max(-1).values)


def test_switch_breaks_ties_as_the_source_document_does():
    router = SwitchRouter(4, 4)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    # Rows 1 and 2 differ in their logits, but not in the float32 probabilities that the argmax is taken of.
    x = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.1, 0.1 + 2e-8, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert router(x).expert_ids[:, 0].tolist() == route_tokens(x).tolist() == [0, 0, 0]


def test_softmax_weights_are_the_probabilities_of_the_best():
    x, options = torch.randn(64, 16), {"normalize": False, "scale": 3.0}
    router = make("softmax", **options)
    probability = torch.softmax(x @ router.weight.T, -1)
    values, ids = probability.topk(2, -1)
    routing = router(x)
    assert torch.equal(routing.expert_ids, ids.int())
    torch.testing.assert_close(routing.weights, 3.0 * values)
    torch.testing.assert_close(routing.scores, probability)


def test_top_k_softmax_is_the_softmax_of_the_kept_logits():
    x, router = torch.randn(64, 16), make("top_k_softmax", scale=2.0)
    values, ids = (x @ router.weight.T).topk(2, -1)
    routing = router(x)
    assert torch.equal(routing.expert_ids, ids.int())
    torch.testing.assert_close(routing.weights, 2.0 * values.softmax(-1))


def test_weights_stay_finite_where_every_kept_score_underflows():
    """A bias can choose experts whose probability is 0 in float32."""
    router = SoftmaxRouter(4, 4, 2, score_bias=True)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    router.score_bias[2:] = 5.0
    routing = router(torch.tensor([[200.0, 0.0, 0.0, -1.0]]))
    assert routing.expert_ids.tolist() == [[2, 3]]
    assert torch.isfinite(routing.weights).all()
    routing.weights.sum().backward()
    assert torch.isfinite(router.weight.grad).all()


SCORES = {
    "sigmoid": lambda logits: 1 / (1 + torch.exp(-logits)),
    "sqrt_softplus": lambda logits: torch.log(1 + torch.exp(logits)).sqrt(),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_of_scores_for_each_expert_alone(name, normalize):
    x = torch.randn(64, 16)
    router = make(name, normalize=normalize, scale=2.5)
    values, ids = SCORES[name](x @ router.weight.T).topk(2, -1)
    routing = router(x)
    assert torch.equal(routing.expert_ids, ids.int())
    expected = values / values.sum(-1, keepdim=True) if normalize else values
    torch.testing.assert_close(routing.weights, 2.5 * expected)


def test_saturated_sigmoids_are_told_apart_by_their_logits():
    router = SigmoidRouter(4, 4, 2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x = torch.tensor([[20.0, 30.0, 25.0, 0.0]])
    assert torch.sigmoid(x[0, 0]) == torch.sigmoid(x[0, 1])
    assert router(x).expert_ids.tolist() == [[1, 2]]


@pytest.mark.parametrize("name", MULTI)
def test_ties_go_to_the_lower_id(name):
    router = make(name, dim=4, num_experts=6, top_k=3)
    with torch.no_grad():
        router.weight.zero_()
    assert router(torch.randn(50, 4)).expert_ids.tolist() == [[0, 1, 2]] * 50


@pytest.mark.parametrize("name", MULTI)
def test_bias_moves_selection_and_not_weights(name):
    router = make(name, normalize=None, score_bias=True)
    x = torch.randn(64, 16)
    plain = make(name)(x)
    assert torch.equal(router(x).expert_ids, plain.expert_ids)  # a bias of zero changes nothing
    router.score_bias[5] = 10.0
    routing = router(x)
    assert (routing.expert_ids[:, 0] == 5).all()
    chosen = routing.scores.gather(1, routing.expert_ids.long())
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.scores, plain.scores)


@pytest.mark.parametrize("name", TOP_K_IN_EVALUATION)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_routes_as_float64_does(name, autocast):
    """Every token whose float64 logits are further apart than float32 can err goes where float64 sends it."""
    router = make(name, 128, 64, 8).bfloat16().eval()
    x = torch.randn(4000, 128).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routing = router(x)
    assert routing.logits.dtype == routing.scores.dtype == routing.weights.dtype == torch.float32
    exact = x.double() @ router.weight.double().T
    top = exact.sort(-1, descending=True).values[:, : router.top_k + 1]
    # A float32 dot product of 128 terms errs by less than 128 * 2^-24 * sum |x w|, about 5e-5 here.
    clear = (top[:, :-1] - top[:, 1:]).min(-1).values > 5e-5
    expected = exact.topk(router.top_k, -1).indices.int()
    assert clear.float().mean() > 0.9
    assert torch.equal(routing.expert_ids[clear], expected[clear])


def test_bfloat16_logits_would_fail_that_test():
    torch.manual_seed(0)
    router = SoftmaxRouter(128, 64, 8).bfloat16()
    x = torch.randn(4000, 128).bfloat16()
    rounded = (x @ router.weight.T).float().topk(8, -1).indices
    exact = (x.double() @ router.weight.double().T).topk(8, -1).indices
    assert (rounded != exact).any(-1).float().mean() > 0.05  # 0.12 measured


@pytest.mark.parametrize("name", ROUTERS)
def test_float64_layers_route_in_float64(name):
    router = make(name).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    routing = router(x, token_ids=ids_of(x))
    assert routing.logits.dtype == routing.weights.dtype == torch.float64


@given(st.integers(0, 40), st.integers(1, 12), st.data())
@settings(max_examples=40)
def test_every_token_gets_distinct_experts_and_permuting_tokens_permutes_them(num_tokens, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(num_tokens * 13 + num_experts)
    router = SoftmaxRouter(8, num_experts, top_k)
    x = torch.randn(num_tokens, 8)
    routing = router(x)
    assert routing.expert_ids.shape == (num_tokens, top_k)
    for ids in routing.expert_ids.tolist():
        assert len(set(ids)) == top_k
        assert all(0 <= e < num_experts for e in ids)
    assert routing.tokens_per_expert().sum() == num_tokens * top_k
    order = torch.randperm(num_tokens)
    assert torch.equal(router(x[order]).expert_ids, routing.expert_ids[order])


@pytest.mark.parametrize("name", ROUTERS)
def test_masked_tokens_get_no_expert_and_no_weight(name):
    """Nor do they change another's: also not where a decision is one for the whole batch."""
    router = make(name).train(name != "noisy_top_k")
    x, mask = torch.randn(10, 16), torch.tensor([True, False] * 5)
    ids = ids_of(x).where(mask, -100)
    routing, alone = router(x, mask, token_ids=ids), router(x[mask], token_ids=ids[mask])
    assert (routing.expert_ids[~mask] == -1).all()
    assert (routing.weights[~mask] == 0).all()
    assert torch.equal(routing.expert_ids[mask], alone.expert_ids)
    torch.testing.assert_close(routing.weights[mask], alone.weights)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_replayed_decision_is_kept_and_its_weights_carry_gradients(name):
    router = make(name)
    x, ids = torch.randn(6, 16), torch.rand(6, 8).argsort(-1)[:, : router.num_slots].int()
    ids[0] = -1
    routing = router(x, replay=lambda *_: ids, token_ids=ids_of(x))
    assert torch.equal(routing.expert_ids, ids)
    assert (routing.weights[0] == 0).all()
    chosen = routing.scores[1:].gather(1, ids[1:].long())
    expected = chosen / chosen.sum(-1, keepdim=True) if router.normalize else chosen
    torch.testing.assert_close(routing.weights[1:], expected)
    routing.weights[1:].square().sum().backward()
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float64])
def test_score_bias_keeps_its_bits_under_any_cast(to):
    router = make("sigmoid", score_bias=True)
    bias = torch.linspace(0, 0.1, 8)
    router.score_bias.copy_(bias)
    router.to(to)
    assert router.weight.dtype == to
    assert router.score_bias.dtype == torch.float32
    assert torch.equal(router.score_bias, bias)
    assert torch.equal(router.state_dict()["score_bias"], bias)


def test_score_bias_is_float32_after_meta_construction():
    router = SigmoidRouter(8, 4, 2, score_bias=True, device="meta", dtype=torch.bfloat16)
    router.to_empty(device="cpu")
    router.reset_parameters()
    assert router.score_bias.dtype == torch.float32
    assert torch.equal(router.score_bias, torch.zeros(4))


def test_initial_scale_is_the_documented_one():
    torch.manual_seed(0)
    weight = SoftmaxRouter(400, 512, 2).weight
    std = (0.1 / 400) ** 0.5
    # 204,800 draws: the standard error of a deviation is 0.16 %.
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert weight.abs().max() <= 2 * std / 0.8796 + 1e-6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("softmax", {"top_k": 0}, "top_k=0 must be between 1 and num_experts=8"),
        ("softmax", {"top_k": 9}, "top_k=9 must be between 1 and num_experts=8"),
        ("softmax", {"dim": 0}, "dim=0 must be positive"),
        ("softmax", {"num_experts": -1}, "num_experts=-1 must be positive"),
        ("softmax", {"scale": 0.0}, "scale=0.0 must be positive"),
        ("softmax", {"top_k": 1, "normalize": True}, "normalize=True with top_k=1"),
        ("top_k_softmax", {"top_k": 1}, "take 'softmax' instead of 'top_k_softmax'"),
        ("softmax", {"scale": float("inf")}, "scale=inf must be finite"),
        ("softmax", {"scale": float("nan")}, "scale=nan must be finite"),
        ("expert_choice", {"capacity_factor": float("inf")}, "capacity_factor=inf must be finite"),
        ("switch", {"top_k": 2}, "'switch' sends each token to one expert, but top_k=2"),
    ],
)
def test_bad_options_are_named(name, options, message):
    sizes = {"dim": 16, "num_experts": 8, "top_k": 2} | options
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        ROUTERS[name](**sizes)


@pytest.mark.parametrize("normalize", ["no", 1, 0.0])
@pytest.mark.usefixtures("unchecked")
def test_a_normalize_that_is_no_bool_is_named(normalize):
    with pytest.raises(ConfigError, match=f"normalize={normalize!r} must be True, False or None"):
        SoftmaxRouter(16, 8, 1, normalize=normalize)


def test_one_expert_a_token_is_weighted_by_its_score_so_that_the_router_learns():
    router = SoftmaxRouter(16, 8, 1)
    routing = router(torch.randn(32, 16))
    assert (routing.weights < 1).all()
    routing.weights.sum().backward()
    assert router.weight.grad.norm() > 1e-3


def test_score_bias_is_float32_after_assignment_from_a_lower_precision():
    router = make("sigmoid", score_bias=True)
    state = {name: value.bfloat16() for name, value in router.state_dict().items()}
    router.load_state_dict(state, assign=True)
    assert router.score_bias.dtype == torch.float32


def test_routes_on_meta_tensors():
    router = SoftmaxRouter(16, 8, 2, device="meta")
    assert router(torch.empty(5, 16, device="meta")).expert_ids.shape == (5, 2)
