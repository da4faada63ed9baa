"""Every router inside a layer: shared experts, padding, capacity, activation checkpointing, bfloat16."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moe
from moe.routing import ROUTERS
from tests.routing.zoo import VOCABULARY, options_of

EXPERTS = 6


def make_layer(name, **options):
    torch.manual_seed(0)
    router = {"name": name, **options_of(name), **options.pop("router", {})}
    layer = moe.MoE(16, 8, EXPERTS, 1 if name == "switch" else 2, router=router, **options)
    if name == "noisy_top_k":
        torch.nn.init.normal_(layer.router.noise_weight, std=0.2)
    return layer


def make_batch(dtype=torch.float32):
    """Three sequences of ten tokens, padded at their ends; padding holds NaN."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(10) < torch.tensor([[10], [7], [4]])
    x = torch.randn(3, 10, 16, generator=generator).masked_fill(~mask[..., None], float("nan")).to(dtype)
    ids = torch.randint(0, VOCABULARY, (3, 10), generator=generator).masked_fill(~mask, -100)
    return x.requires_grad_(), mask, ids


def step(layer, x, mask, ids, how=None):
    """One training step; the output, all gradients and the load."""
    torch.manual_seed(2)
    run = layer if how is None else lambda *args: checkpoint(layer, *args, use_reentrant=how)
    y = run(x, mask, ids)
    (y[mask].float().square().sum() + moe.balance_loss(layer)).backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None} | {"x": x.grad}
    return y, grads, moe.balance_step(layer)[""]


OPTIONS = {
    "plain": {},
    "shared": {"shared_hidden_dim": 8, "shared_gate": True},
    "capacity": {"capacity_factor": 1.0},
    "recompute": {"recompute": "up"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_layer_of_every_router_trains(name, dtype, options):
    layer = make_layer(name, dtype=dtype, **OPTIONS[options])
    x, mask, ids = make_batch(dtype)
    y, grads, load = step(layer, x, mask, ids)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    for parameter, grad in grads.items():
        assert torch.isfinite(grad).all(), parameter
    assert grads["router.weight"].abs().sum() > 0
    assert all(grad.abs().sum() > 0 for parameter, grad in grads.items() if parameter.startswith("experts."))
    assert load.tokens == 21
    assert 0 < load.tokens_per_expert.sum() <= 21 * layer.router.num_slots


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_checkpointing_repeats_the_decision(name, reentrant):
    plain, repeated = make_layer(name), make_layer(name)
    (y, grads, load), (y2, grads2, load2) = step(plain, *make_batch()), step(repeated, *make_batch(), how=reentrant)
    torch.testing.assert_close(y2, y)
    assert grads.keys() == grads2.keys()
    for parameter, grad in grads.items():
        torch.testing.assert_close(grads2[parameter], grad)
    assert torch.equal(load.tokens_per_expert, load2.tokens_per_expert)


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_changes_nothing(name):
    """The tokens that count are routed as if there were no others; for noise, which a place in the batch draws, not."""
    layer = make_layer(name).train(name != "noisy_top_k")
    x, mask, ids = make_batch()
    padded = layer(x, mask, ids)
    alone = layer(x[mask], None, ids[mask])
    torch.testing.assert_close(padded[mask], alone)
    assert (padded[~mask] == 0).all()


@pytest.mark.parametrize("output", ["zero", "identity"])
@pytest.mark.parametrize(
    "name", ["softmax", "top_k_softmax", "sigmoid", "sqrt_softplus", "switch", "noisy_top_k", "threshold"]
)
def test_a_layer_with_null_experts_trains(name, output):
    layer = make_layer(name, router={"null_ratio": 0.25, "null_output": output}, capacity_factor=2.0)
    x, mask, ids = make_batch()
    y, grads, load = step(layer, x, mask, ids)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert len(load.tokens_per_expert) == EXPERTS + 2
    assert load.tokens_per_expert[EXPERTS:].sum() > 0
