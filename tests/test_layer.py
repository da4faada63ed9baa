"""The layer as a user meets it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe
from moe.errors import ConfigError
from moe.routing import ROUTERS, SoftmaxRouter
from tests.support.oracle import ACTIVATIONS, experts_oracle, feed_forward

PER_TOKEN = ("softmax", "top_k_softmax", "sigmoid", "sqrt_softplus", "switch", "hash", "relu", "threshold")
"""Routers that decide for each token alone, without noise."""


def named(router):
    """What the layer takes for a name; two experts a token where the router lets one choose."""
    options = {"name": router, "vocab_size": 50} if router == "hash" else {"name": router}
    return {"router": options, "top_k": 1 if router == "switch" else 2}


def make(dim=8, hidden_dim=16, num_experts=6, top_k=2, seed=0, **options):
    torch.manual_seed(seed)
    return moe.MoE(dim, hidden_dim, num_experts, top_k, **options)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8), (2, 0, 8)])
def test_any_leading_dimensions(shape):
    layer = make()
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, 8), layer(x.reshape(-1, 8)))
    (y.sum() + moe.balance_loss(layer)).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("capacity_factor", [None, 0.7])
def test_output_and_gradients_match_the_oracle(router, capacity_factor):
    """The routed sum in float64, with the router's decision taken as given."""
    layer = make(**named(router), capacity_factor=capacity_factor, balance=()).double()
    x, ids = torch.randn(30, 8, dtype=torch.float64, requires_grad=True), torch.randint(50, (30,))
    torch.manual_seed(1)
    y = layer(x, token_ids=ids)
    (call,) = layer.calls.open_calls()
    assert (call.kept != call.chosen).any() == (capacity_factor is not None)
    inputs = [x, *layer.parameters()]
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, upstream, retain_graph=True)
    torch.manual_seed(1)  # a noisy router's weights are of the same draw
    replayed = layer.router(x, replay=lambda *_: call.chosen, token_ids=ids).keep(call.kept >= 0)
    expected = experts_oracle(layer.experts, x, replayed)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, torch.autograd.grad(expected, inputs, upstream)):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from(PER_TOKEN))
@settings(max_examples=25)
def test_permuting_tokens_permutes_the_output(num_tokens, seed, router):
    layer = make(**named(router), seed=seed).double()
    x, ids = torch.randn(num_tokens, 8, dtype=torch.float64), torch.randint(50, (num_tokens,))
    order = torch.randperm(num_tokens)
    found = layer(x[order], token_ids=ids[order])
    torch.testing.assert_close(found, layer(x, token_ids=ids)[order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("output", ["zero", "identity"])
def test_null_experts_compute_nothing(output):
    """Against the same layer whose null experts are real ones, of weights that make them 0 or the identity."""
    router = {"name": "sigmoid", "null_ratio": 1 / 3, "null_output": output, "normalize": False}
    layer = make(num_experts=4, top_k=3, router=router, activation="relu", balance=[moe.ScoreBias(0.1)]).double()
    x = torch.randn(25, 8, dtype=torch.float64).abs().requires_grad_()
    y = layer(x)
    whole = make(
        num_experts=6, top_k=3, router={"name": "sigmoid", "normalize": False}, activation="relu", balance=()
    ).double()
    with torch.no_grad():
        whole.router.weight.copy_(layer.router.weight)
        whole.experts.up_weight[:4], whole.experts.down_weight[:4] = layer.experts.up_weight, layer.experts.down_weight
        eye = torch.eye(16, 8, dtype=torch.float64)  # tokens are positive, so relu keeps them
        whole.experts.up_weight[4:], whole.experts.down_weight[4:] = eye, eye.T if output == "identity" else 0 * eye.T
    torch.testing.assert_close(y, whole(x), rtol=1e-12, atol=1e-13)
    grads = [torch.autograd.grad(m(x).square().sum(), (x, m.router.weight)) for m in (layer, whole)]
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    moe.balance_loss(layer)
    load = moe.balance_step(layer)[""]
    counts = load.tokens_per_expert
    assert counts.sum() == 2 * 25 * 3  # of both calls
    assert load.null_rate == counts[4:].sum() / counts.sum()
    assert load.dropped == 0
    assert torch.equal(layer.router.score_bias.sign(), (counts.double().mean() - counts).sign().float())


def test_shared_experts_see_every_token():
    layer = make(shared_hidden_dim=12, shared_gate=True, bias=True).double()
    routed = make(bias=True).double()
    routed.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("shared")})
    x = torch.randn(20, 8, dtype=torch.float64)
    s = layer.shared
    shared = feed_forward(x, s.up.weight, s.down.weight, s.up.bias, s.down.bias, "swiglu")
    shared = shared * torch.sigmoid(x @ s.gate.weight.T)
    torch.testing.assert_close(layer(x), routed(x) + shared, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_reaches_routed_and_shared_experts(activation):
    layer = make(activation=activation, shared_hidden_dim=4, top_k=1, num_experts=1).double()
    x, e, s = torch.randn(7, 8, dtype=torch.float64), layer.experts, layer.shared
    routed = feed_forward(x, e.up_weight[0], e.down_weight[0], None, None, activation)
    shared = feed_forward(x, s.up.weight, s.down.weight, None, None, activation)
    torch.testing.assert_close(layer(x), routed + shared, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("policy", "kept"), [("position", [0, 1]), ("probability", [2, 3])])
def test_the_drop_policy_decides_who_stays(policy, kept):
    layer = make(dim=2, num_experts=2, top_k=1, capacity_factor=1.0, drop_policy=policy)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))
    y = layer(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]]))
    assert y.abs().sum(-1).nonzero().flatten().tolist() == kept


def test_the_output_may_be_changed_in_place():
    layer, x = make(), torch.randn(5, 8)
    y = layer(x)
    y += x
    nn.Sequential(make(), nn.ReLU(inplace=True))(x).sum().backward()
    y.sum().backward()
    assert layer.experts.up_weight.grad.abs().sum() > 0


def test_float64_is_left_alone_by_autocast():
    layer, x = make().double(), torch.randn(5, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float64


@pytest.mark.parametrize("kind", [None, False, True])
def test_bfloat16_autocast_is_the_same_under_checkpointing(kind):
    plain, layer, x = make(bias=True), make(bias=True), torch.randn(20, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x) if kind is None else checkpoint(layer, x, use_reentrant=kind)
        y_plain = plain(x)
    assert y.dtype == torch.bfloat16
    (y.float().square().sum() + moe.balance_loss(layer)).backward()
    (y_plain.float().square().sum() + moe.balance_loss(plain)).backward()
    for mine, theirs in zip(layer.parameters(), plain.parameters()):
        assert torch.equal(mine.grad, theirs.grad)


def test_masked_tokens_do_not_matter_whatever_they_hold():
    layer = make()
    x, mask = torch.randn(4, 5, 8), torch.rand(4, 5) < 0.6
    hostile = x.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    y = layer(hostile, mask)
    extra = moe.balance_loss(layer)
    (y.square().sum() + extra).backward()
    alone = make()
    y_alone = alone(x[mask])
    extra_alone = moe.balance_loss(alone)
    (y_alone.square().sum() + extra_alone).backward()
    torch.testing.assert_close(y[mask], y_alone)
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(extra, extra_alone)
    for mine, theirs in zip(layer.parameters(), alone.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert (hostile.grad[~mask] == 0).all()
    assert moe.balance_step(layer)[""].tokens == mask.sum()


def test_all_tokens_to_one_expert():
    layer = make(top_k=1)
    with torch.no_grad():
        layer.router.weight.zero_()  # all tie: the lowest id wins
    x = torch.randn(50, 8, requires_grad=True)
    y = layer(x)
    (y.square().sum() + moe.balance_loss(layer)).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    stats = moe.balance_step(layer)[""]
    assert stats.tokens_per_expert.tolist() == [50, 0, 0, 0, 0, 0]
    assert stats.max_vio == 5
    assert stats.dead_experts == 5


def test_drops_are_reported():
    layer = make(num_experts=2, top_k=1, capacity_factor=1.0)
    with torch.no_grad():
        layer.router.weight.zero_()
    y = layer(torch.randn(10, 8))
    moe.balance_loss(layer)
    stats = moe.balance_step(layer)[""]
    assert stats.dropped == 5  # ten to the first, which has room for five
    assert stats.drop_rate == 0.5
    assert (y.abs().sum(-1) == 0).sum() == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_layers_stay_close_and_route_alike(dtype):
    torch.manual_seed(0)
    low = moe.MoE(64, 32, 8, 2).to(dtype)
    exact = moe.MoE(64, 32, 8, 2).double()
    exact.load_state_dict({k: v.double() for k, v in low.state_dict().items()})
    x = torch.randn(200, 64).to(dtype)
    y, y_exact = low(x), exact(x.double())
    assert y.dtype == dtype
    relative = (y.double() - y_exact).norm() / y_exact.norm()
    # Three roundings of the result's parts to 8 (bf16) or 11 (fp16) bits: about 2^-8 and 2^-11 each.
    assert relative < (1.2e-2 if dtype == torch.bfloat16 else 1.5e-3)


def skewed_tokens(num_tokens):
    """Tokens whose first feature is always 1, for a router that starts out liking it."""
    x = torch.randn(num_tokens, 8)
    x[:, 0] = 1.0
    return x


def skewed_layer(favour, **options):
    layer = make(num_experts=8, **options)
    with torch.no_grad():
        layer.router.weight[:2, 0] = favour
    return layer


def test_training_balances_the_load():
    layer = skewed_layer(2.0, balance={"squared_deviation": {"coefficient": 0.1}})
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    loads = []
    for _ in range(100):
        x = skewed_tokens(256)
        ((layer(x) - x).square().mean() + moe.balance_loss(layer)).backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append(moe.balance_step(layer)[""])
    last = sum(loads[-10:], start=loads[-11])
    assert loads[0].max_vio > 1.5
    assert last.max_vio < 0.4


def test_a_bias_balances_without_a_loss():
    layer = skewed_layer(1.0, balance={"score_bias": {"rate": 0.01}}, router="sigmoid")
    x, loads = skewed_tokens(512), []
    for _ in range(150):
        with torch.no_grad():
            layer(x)
        loads.append(moe.balance_step(layer)[""])
    last = sum(loads[-10:], start=loads[-11])
    assert loads[0].max_vio > 1.5
    assert last.max_vio < 0.25


def test_balance_loss_of_several_layers_is_their_sum():
    model = nn.Sequential(make(seed=1), make(seed=2), nn.Linear(8, 8))
    x = torch.randn(30, 8)
    h = model[0](x)
    first = moe.balance_loss(model)
    model[1](h)
    second = moe.balance_loss(model)
    model(x)
    torch.testing.assert_close(moe.balance_loss(model), first + second)
    assert [name for name, _ in moe.moe_layers(model)] == ["0", "1"]
    assert set(moe.balance_step(model)) == {"0", "1"}


def test_a_model_without_experts_has_no_balance_loss():
    model = nn.Linear(4, 4)
    assert moe.balance_loss(model).item() == 0
    assert moe.balance_step(model) == {}


def test_a_router_of_ones_own():
    router = SoftmaxRouter(8, 6, 3, normalize=False)
    layer = moe.MoE(8, 16, 6, 3, router=router)
    assert layer.router is router
    with pytest.raises(
        ConfigError, match=r"router has \(dim, num_experts, top_k\)=\(8, 6, 3\), but the layer has \(8, 6, 2\)"
    ):
        moe.MoE(8, 16, 6, 2, router=router)
    with pytest.raises(ConfigError, match=r"router was made with score_bias=False"):
        moe.MoE(8, 16, 6, 3, router=router, balance=[moe.ScoreBias()])


def test_state_dict_holds_parameters_and_the_bias_only():
    layer = make(balance=[moe.ScoreBias()], bias=True, shared_hidden_dim=4)
    layer(torch.randn(3, 8))
    assert set(layer.state_dict()) == {
        *("router.weight", "router.score_bias", "experts.up_weight", "experts.down_weight"),
        *("experts.up_bias", "experts.down_bias"),
        *("shared.up.weight", "shared.up.bias", "shared.down.weight", "shared.down.bias"),
    }
