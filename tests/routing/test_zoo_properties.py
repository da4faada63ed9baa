"""What holds for every router, whatever its idea."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import make
from moe.errors import ConfigError
from moe.routing import ROUTERS
from tests.routing.zoo import OWN_TOKENS_ONLY, build, ids_of, options_of

EXACTLY_K = [name for name in ROUTERS if name not in ("expert_choice", "relu", "threshold")]


def make_batch(num_tokens, masked, dim=16):
    x = torch.randn(num_tokens, dim)
    return x, torch.rand(num_tokens) < 0.7 if masked else None, ids_of(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
@given(st.integers(0, 40), st.integers(1, 12), st.booleans(), st.data())
@settings(max_examples=20)
def test_experts_of_a_token_are_distinct_and_padding_has_none(name, training, num_tokens, num_experts, masked, data):
    if name == "top_k_softmax":  # with one expert its weight would always be 1, which is refused
        num_experts += 1
    top_k = 1 if name == "switch" else data.draw(st.integers(1 + (name == "top_k_softmax"), num_experts))
    # Enough tokens for a capacity of 1, or expert choice refuses.
    num_tokens = num_tokens if name != "expert_choice" or num_tokens == 0 else max(num_tokens, num_experts)
    router = build(name, 16, num_experts, top_k, seed=num_tokens).train(training)
    x, mask, ids = make_batch(num_tokens, masked)
    routing = router(x, mask, token_ids=ids)
    assert routing.expert_ids.shape == routing.weights.shape == (num_tokens, router.num_slots)
    assert routing.expert_ids.dtype == torch.int32
    for t, row in enumerate(routing.expert_ids.tolist()):
        own = [e for e in row if e >= 0]
        assert row == own + [-1] * (len(row) - len(own))
        assert len(set(own)) == len(own)
        assert all(e < num_experts for e in own)
        if mask is not None and not mask[t]:
            assert not own
        elif name in EXACTLY_K:
            assert len(own) == top_k
    assert (routing.weights[routing.expert_ids < 0] == 0).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=10)
def test_a_replayed_decision_is_identical_from_other_logits(name, training, seed, masked):
    """Ids are the first decision's; weights and gradients are those of a decision with the same ids and new logits."""
    router = build(name, seed=seed).train(training)
    x, mask, ids = make_batch(20, masked)
    first = router(x, mask, token_ids=ids)
    other = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    state = torch.get_rng_state()
    routing = router(other, mask, lambda *_: first.expert_ids, ids)
    torch.set_rng_state(state)
    free = router(other, mask, token_ids=ids)
    assert torch.equal(routing.expert_ids, first.expert_ids)
    assert torch.equal(routing.logits, free.logits)
    assert torch.equal(routing.scores, free.scores)
    expected = router.weigh(free.scores, first.expert_ids)
    torch.testing.assert_close(routing.weights, expected)
    grads = [torch.autograd.grad(w.square().sum(), other, retain_graph=True)[0] for w in (routing.weights, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ROUTERS)
def test_decisions_repeat_and_ties_go_to_the_lower_expert(name):
    router = build(name, dim=4, num_experts=6, top_k=3).eval()
    x = torch.randn(12, 4)
    first, again = (router(x, token_ids=ids_of(x)) for _ in range(2))
    assert torch.equal(first.expert_ids, again.expert_ids)
    with torch.no_grad():
        router.weight.zero_()
    ids = router(x, token_ids=ids_of(x)).expert_ids
    if name in EXACTLY_K and name != "hash":
        assert ids.tolist() == [list(range(router.top_k))] * 12
    if name == "expert_choice":  # of equal tokens each expert takes the earlier: 6 of 12
        assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 6 + [[-1] * 6] * 6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_scores_are_float32_and_gradients_finite_in_bfloat16(name, training):
    router = build(name).bfloat16().train(training)
    x = torch.randn(24, 16, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x, torch.arange(24) % 5 > 0, token_ids=ids_of(x))
    assert routing.weights.dtype == routing.scores.dtype == routing.logits.dtype == torch.float32
    loss = (routing.weights.sum(-1) * torch.randn(24)).sum() + routing.weights.square().sum()
    loss.backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(router.weight.grad).all()
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(name, num_tokens):
    router = build(name, num_experts=3, top_k=3)
    x = torch.randn(num_tokens, 16, requires_grad=True)
    routing = router(x, token_ids=ids_of(x))
    routing.weights.sum().backward()
    assert torch.isfinite(x.grad).all()
    masked = router(x, torch.zeros(num_tokens, dtype=torch.bool), token_ids=ids_of(x))
    assert (masked.expert_ids == -1).all()
    assert torch.isfinite(masked.scores).all()


@pytest.mark.parametrize("name", OWN_TOKENS_ONLY)
def test_a_token_alone_is_routed_as_in_a_batch(name):
    router = build(name).eval()
    x = torch.randn(30, 16)
    ids = ids_of(x)
    whole = router(x, token_ids=ids)
    for t in (0, 17):
        alone = router(x[t : t + 1], token_ids=ids[t : t + 1])
        assert torch.equal(alone.expert_ids[0], whole.expert_ids[t])
        torch.testing.assert_close(alone.weights[0], whole.weights[t])


@pytest.mark.parametrize("name", ROUTERS)
def test_no_later_token_matters_to_a_causal_router(name):
    router = build(name).eval()
    x = torch.randn(64, 16)
    changed = torch.cat([x[:32], torch.randn(32, 16) * 5])
    ids = ids_of(x)
    same = torch.equal(router(x, token_ids=ids).expert_ids[:32], router(changed, token_ids=ids).expert_ids[:32])
    assert same == router.is_causal
    assert router.is_causal == (name != "expert_choice")


TAKES_NULL = ("softmax", "top_k_softmax", "sigmoid", "sqrt_softplus", "switch", "noisy_top_k", "threshold")


@pytest.mark.parametrize("name", ROUTERS)
def test_null_experts_are_chosen_as_any_other_or_refused(name):
    if name not in TAKES_NULL:
        with pytest.raises(ConfigError, match=r"null_ratio=0.5: \w+ does not choose among null experts"):
            build(name, null_ratio=0.5)
        return
    router = build(name, num_experts=6, top_k=3, null_ratio=0.25)
    routing = router(torch.randn(200, 16))
    assert (routing.num_experts, routing.num_real_experts) == (8, 6)
    assert (routing.tokens_per_expert() > 0).all()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[7] = 1.0
    assert (router.eval()(torch.ones(1, 16)).expert_ids[:, 0] == 7).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_bias_moves_the_selection_or_is_refused(name):
    if not build(name).takes_score_bias:
        with pytest.raises(ConfigError, match="no bias changes what it selects"):
            build(name, score_bias=True)
        return
    router = build(name, score_bias=True)
    router.score_bias[5] = 100.0
    assert (router(torch.randn(20, 16)).expert_ids[:, 0] == 5).all()


@pytest.mark.parametrize("name", ["switch", "noisy_top_k", "expert_choice", "sinkhorn", "base", "hash", "relu"])
def test_groups_are_refused_where_there_are_none(name):
    with pytest.raises(ConfigError, match=r"num_groups=4: \w+ has no groups"):
        build(name, num_groups=4, top_groups=2)


def test_threshold_routing_stays_within_a_tokens_groups():
    routing = build("threshold", num_experts=12, top_k=3, num_groups=4, top_groups=1, threshold=1.0)(
        torch.randn(50, 16)
    )
    assert (routing.expert_ids // 3 == routing.expert_ids[:, :1] // 3).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_config_names_a_router_and_its_options(name):
    """Those of the base class too, and one that does not exist is named."""
    sizes = {"dim": 8, "num_experts": 4, "top_k": 1 if name == "switch" else 2, "score_bias": False}
    router = make("router", {"name": name, "scale": 2.5, **options_of(name)}, ROUTERS, **sizes)
    assert router.scale == 2.5
    with pytest.raises(ConfigError, match="wrong"):
        make("router", {"name": name, "wrong": 1, **options_of(name)}, ROUTERS, **sizes)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_made_on_meta_is_one_made_on_the_cpu_after_a_reset(name):
    made, other = (
        ROUTERS[name](16, 8, 1 if name == "switch" else 2, **options_of(name), device=device)
        for device in ("meta", "cpu")
    )
    made.to_empty(device="cpu")
    for router in (made, other):
        torch.manual_seed(3)
        router.reset_parameters()
    assert made.state_dict().keys() == other.state_dict().keys()
    for key, value in made.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
