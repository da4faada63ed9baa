"""The experts' operation against every token through every expert and a mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import ConfigError, DtypeError
from moe.experts import FeedForward, GroupedExperts
from moe.types import Routing
from tests.support.oracle import ACTIVATIONS, experts_oracle, feed_forward


def random_routing(num_tokens, num_experts, top_k, seed=0, none_share=0.2):
    """Distinct experts for each token, some of them none; weights that add up to anything."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :top_k].int()
    ids = ids.masked_fill(torch.rand(num_tokens, top_k, generator=generator) < none_share, -1)
    return routing_of(ids, num_experts, generator)


def routing_of(ids, num_experts, generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64).masked_fill(ids < 0, 0.0).requires_grad_()
    scores = torch.zeros(len(ids), num_experts, dtype=torch.float64)
    return Routing(ids, weights, scores, scores)


def make(num_experts=4, dim=6, hidden_dim=5, **options):
    torch.manual_seed(0)
    experts = GroupedExperts(num_experts, dim, hidden_dim, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    return experts


def assert_same_as_oracle(experts, routing, num_tokens):
    """Output and every gradient, in float64: sums of some ten terms differ by their rounding only."""
    x = torch.randn(num_tokens, experts.up_weight.shape[-1], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    inputs = [x, routing.weights, *experts.parameters()]
    found, expected = experts(x, routing), experts_oracle(experts, x, routing)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found, inputs, upstream)
    # Where nothing is routed the oracle does not depend on an input.
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, inputs, upstream)):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_matches_the_dense_mask_oracle(activation, bias):
    experts = make(activation=activation, bias=bias)
    assert_same_as_oracle(experts, random_routing(23, 4, 2), 23)


@given(st.integers(0, 30), st.integers(1, 7), st.booleans(), st.floats(0, 1), st.data())
@settings(max_examples=30)
def test_matches_the_oracle_for_ragged_loads(num_tokens, num_experts, bias, none_share, data):
    top_k = data.draw(st.integers(1, num_experts))
    experts = make(num_experts, bias=bias)
    assert_same_as_oracle(experts, random_routing(num_tokens, num_experts, top_k, num_tokens, none_share), num_tokens)


@pytest.mark.parametrize("bias", [False, True])
def test_all_tokens_to_one_expert(bias):
    experts = make(bias=bias)
    ids = torch.full((9, 1), 2, dtype=torch.int32)
    assert_same_as_oracle(experts, routing_of(ids, 4), 9)


def test_experts_without_tokens_get_zero_gradients():
    experts = make(bias=True)
    ids = torch.full((9, 1), 2, dtype=torch.int32)
    experts(torch.randn(9, 6, dtype=torch.float64), routing_of(ids, 4)).square().sum().backward()
    for parameter in experts.parameters():
        norms = parameter.grad.flatten(1).norm(dim=1)
        assert (norms[[0, 1, 3]] == 0).all()
        assert norms[2] > 0


def test_a_token_without_an_expert_gets_zero():
    experts = make(bias=True)
    ids = torch.tensor([[0, 1], [-1, -1]], dtype=torch.int32)
    y = experts(torch.randn(2, 6, dtype=torch.float64), routing_of(ids, 4))
    assert (y[1] == 0).all()
    assert (y[0] != 0).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(activation, bias):
    experts = make(3, 3, 2, activation=activation, bias=bias)
    ids = torch.tensor([[0, 2], [2, -1], [0, 2]], dtype=torch.int32)  # expert 1 gets nothing
    routing = routing_of(ids, 3)
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def run(x, weights, *parameters):
        names = [name for name, _ in experts.named_parameters()]
        call = (x, Routing(ids, weights, routing.scores, routing.logits))
        return torch.func.functional_call(experts, dict(zip(names, parameters)), call)

    assert torch.autograd.gradcheck(run, (x, routing.weights, *experts.parameters()))


def test_repeats_bit_for_bit():
    torch.manual_seed(0)
    experts = GroupedExperts(8, 32, 16)
    x = torch.randn(200, 32, requires_grad=True)
    routing = random_routing(200, 8, 3)

    def once():
        weights = routing.weights.detach().float().requires_grad_()
        y = experts(x, Routing(routing.expert_ids, weights, routing.scores, routing.logits))
        return (y, *torch.autograd.grad(y.square().sum(), [x, weights, *experts.parameters()]))

    for first, second in zip(once(), once()):
        assert torch.equal(first, second)


def test_autocast_computes_in_its_dtype():
    torch.manual_seed(0)
    experts = GroupedExperts(4, 16, 8, bias=True)
    x, routing = torch.randn(10, 16), random_routing(10, 4, 2)
    routing = Routing(routing.expert_ids, routing.weights.detach().float(), routing.scores, routing.logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x, routing)
    assert y.dtype == torch.bfloat16
    # Four roundings to 8 bits on numbers of this size.
    torch.testing.assert_close(y.float(), experts(x, routing), rtol=0.05, atol=2e-3)
    y.float().sum().backward()
    assert experts.up_weight.grad.dtype == torch.float32


def test_other_dtypes_are_refused_by_name():
    with pytest.raises(DtypeError, match=r"x is torch.bfloat16 but the experts' weights are torch.float64"):
        make()(torch.randn(9, 6).bfloat16(), random_routing(9, 4, 2))


@pytest.mark.parametrize("gated", [True, False])
def test_initial_scale_is_that_of_one_expert(gated):
    """sqrt(0.1 / fan_in) with the fan-in of one matrix; 200,000 draws have a standard error of 0.16 %."""
    torch.manual_seed(0)
    experts = GroupedExperts(16, 200, 100, activation="swiglu" if gated else "gelu", bias=True)
    assert experts.up_weight.shape == (16, 200 if gated else 100, 200)
    assert experts.down_weight.shape == (16, 200, 100)
    assert experts.up_weight.std().item() == pytest.approx((0.1 / 200) ** 0.5, rel=0.01)
    assert experts.down_weight.std().item() == pytest.approx((0.1 / 100) ** 0.5, rel=0.01)
    assert (experts.up_bias == 0).all()
    assert (experts.down_bias == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", [False, True])
def test_feed_forward_is_one_expert(activation, gate):
    torch.manual_seed(0)
    block = FeedForward(6, 5, activation=activation, bias=True, gate=gate, dtype=torch.float64)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = feed_forward(x, block.up.weight, block.down.weight, block.up.bias, block.down.bias, activation)
    if gate:
        expected = expected / (1 + torch.exp(-(x @ block.gate.weight.T)))
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["num_experts", "dim", "hidden_dim"])
def test_sizes_must_be_positive(name):
    sizes = {"num_experts": 2, "dim": 2, "hidden_dim": 2} | {name: 0}
    with pytest.raises(ConfigError, match=f"{name}=0 must be positive"):
        GroupedExperts(**sizes)


def test_unknown_activation_is_named():
    with pytest.raises(ConfigError, match="activation='tanh' is unknown; choose one of swiglu, gelu, relu"):
        GroupedExperts(2, 2, 2, activation="tanh")
