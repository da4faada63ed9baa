"""Noisy top-k: the formula, the probability of a choice, and where there is no noise."""

import math

import pytest
import torch

from moe.routing import NoisyTopKRouter, SoftmaxRouter, selection_probability
from tests.routing.zoo import build


def test_the_decision_is_that_of_the_papers_formula():
    router = build("noisy_top_k")
    x = torch.randn(50, 16)
    torch.manual_seed(5)
    routing = router(x)
    torch.manual_seed(5)
    deviation = torch.log(1 + torch.exp(x @ router.noise_weight.T))
    noisy = x @ router.weight.T + torch.randn(50, 8) * deviation
    values, ids = noisy.topk(2, -1)
    assert torch.equal(routing.expert_ids, ids.int())
    torch.testing.assert_close(routing.logits, noisy)
    torch.testing.assert_close(routing.weights, values.softmax(-1))


def test_the_noise_starts_with_a_deviation_of_log_2_and_evaluation_has_none():
    router = NoisyTopKRouter(16, 8, 2)
    assert (router.noise_weight == 0).all()
    x = torch.randn(4000, 16)
    clean = router.eval()(x)
    noise = router.train()(x).logits - clean.logits
    # 32,000 draws: the standard error of a deviation is 0.4 %.
    assert noise.std().item() == pytest.approx(math.log(2), rel=0.02)
    assert clean.selection_probability is None
    plain = SoftmaxRouter(16, 8, 2)
    plain.weight = router.weight
    assert torch.equal(clean.expert_ids, plain(x).expert_ids)
    assert torch.equal(clean.weights, plain(x).weights)


@pytest.mark.parametrize("top_k", [1, 3, 5, 6])
def test_the_probability_is_how_often_an_expert_is_chosen_if_its_noise_is_drawn_anew(top_k):
    """Against 40,000 draws for each expert of one token: the standard error is at most 0.0025."""
    torch.manual_seed(0)
    clean, deviation = torch.randn(1, 6), torch.rand(1, 6) + 0.2
    noisy = clean + torch.randn(1, 6) * deviation
    found = selection_probability(clean, noisy, deviation, top_k)
    for e in range(6):
        redrawn = noisy.repeat(40000, 1)
        redrawn[:, e] = clean[0, e] + torch.randn(40000) * deviation[0, e]
        chosen = (redrawn.topk(top_k, -1).indices == e).any(-1).float().mean()
        assert found[0, e].item() == pytest.approx(chosen.item(), abs=0.01)


def test_the_probability_reaches_both_weights_with_the_gradients_of_a_loop_in_float64():
    router = build("noisy_top_k").double()
    x = torch.randn(9, 16, dtype=torch.float64)
    coefficient = torch.randn(9, 8, dtype=torch.float64)
    torch.manual_seed(5)
    (router(x).selection_probability * coefficient).sum().backward()
    weight, noise_weight = (p.detach().clone().requires_grad_() for p in (router.weight, router.noise_weight))
    torch.manual_seed(5)
    draws, total = torch.randn(9, 8, dtype=torch.float64), 0.0
    for t in range(9):
        clean, deviation = weight @ x[t], torch.log(1 + torch.exp(noise_weight @ x[t]))
        noisy = clean + draws[t] * deviation
        for e in range(8):
            others = sorted((noisy[i] for i in range(8) if i != e), key=lambda v: v.item(), reverse=True)
            z = (clean[e] - others[router.top_k - 1]) / deviation[e]
            total = total + coefficient[t, e] * (1 + torch.erf(z / math.sqrt(2))) / 2
    total.backward()
    torch.testing.assert_close(router.weight.grad, weight.grad)
    torch.testing.assert_close(router.noise_weight.grad, noise_weight.grad)


def test_noise_that_underflows_makes_no_infinite_gradient():
    router = build("noisy_top_k")
    with torch.no_grad():
        router.noise_weight.fill_(-50.0)
    router(torch.ones(3, 16)).selection_probability.sum().backward()
    assert torch.isfinite(router.weight.grad).all()
    assert torch.isfinite(router.noise_weight.grad).all()


def test_with_a_bias_no_probability_is_claimed():
    assert build("noisy_top_k", score_bias=True)(torch.randn(3, 16)).selection_probability is None
