"""The ways a router computes its decision: fused, in steps of one's own, within groups, batch-invariant."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moe
from moe.errors import ConfigError
from moe.kernels.route import ScoreFunction
from moe.routing import Router, SigmoidRouter, SoftmaxRouter, Tokens, balanced
from tests.routing.zoo import OWN_TOKENS_ONLY, build, ids_of

OPTIONS = [
    {},
    {"normalize": False, "scale": 2.5},
    {"score_bias": True},
    {"num_groups": 4, "top_groups": 2},
    {"num_groups": 4, "top_groups": 2, "score_bias": True},
]


class InSteps(Router):
    """The softmax router as a user would write it."""

    def score(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


def made(kind: type[Router], **options: object) -> Router:
    torch.manual_seed(0)
    router = kind(16, 12, 3, **options)
    if router.score_bias is not None:
        router.score_bias.copy_(torch.randn(12) * 0.05)
    return router


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("replays", [False, True])
def test_scores_of_ones_own_give_the_same_decision_and_gradients_as_the_fused_operation(
    options: dict[str, object], replays: bool
) -> None:
    x, mask = torch.randn(40, 16), torch.rand(40) < 0.8
    earlier = torch.randint(-1, 12, (40, 3), dtype=torch.int32)
    results = []
    for kind in (SoftmaxRouter, InSteps):
        router = made(kind, **options)
        routing = router(x, mask, (lambda ids, scores: earlier) if replays else None)
        (routing.weights.square().sum() + routing.scores.square().sum()).backward()
        results.append((routing, router.weight.grad))
    (fused, fused_grad), (steps, steps_grad) = results
    assert torch.equal(fused.expert_ids, steps.expert_ids)
    assert torch.equal(fused.expert_ids, earlier) == replays
    torch.testing.assert_close(fused.weights, steps.weights)
    torch.testing.assert_close(fused.scores, steps.scores)
    torch.testing.assert_close(fused_grad, steps_grad)


@pytest.mark.parametrize("hook", ["score", "select", "weigh"])
def test_what_a_subclass_overrides_is_what_runs(hook: str) -> None:
    calls = []

    def overridden(self: Router, *args: Tensor) -> Tensor:
        calls.append(hook)
        return getattr(super(Own, self), hook)(*args)

    Own = type("Own", (SigmoidRouter,), {hook: overridden, "__doc__": "A router with a hook."})
    x = torch.randn(5, 16)
    routing, fused = made(Own)(x), made(SigmoidRouter)(x)
    assert calls == [hook]
    assert torch.equal(routing.expert_ids, fused.expert_ids)


@pytest.mark.parametrize("adds_noise", [False, True])
def test_ids_that_are_given_are_not_selected_again_unless_random_numbers_are_drawn(adds_noise: bool) -> None:
    calls = []

    class Counted(InSteps):
        """Notes when it selects."""

        def select(self, logits: Tensor, scores: Tensor, tokens: Tokens) -> Tensor:
            calls.append(tokens)
            return super().select(logits, scores, tokens)

    Counted.adds_noise = adds_noise
    router, x = made(Counted), torch.randn(7, 16)
    given = torch.randint(-1, 12, (7, 3), dtype=torch.int32)
    routing = router(x, None, given)
    assert len(calls) == adds_noise
    assert torch.equal(routing.expert_ids, given)
    torch.testing.assert_close(routing.weights, router(x, None, lambda ids, scores: given).weights)


def test_a_recomputation_that_knows_its_call_does_not_solve_the_assignment_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solved = []
    solve = balanced.balanced_assignment
    monkeypatch.setattr(balanced, "balanced_assignment", lambda *args: (solved.append(1), solve(*args))[1])
    layer, x = moe.MoE(16, 8, 6, 2, router="base", balance=()), torch.randn(20, 16, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False, context_fn=moe.checkpoint_contexts).sum().backward()
    assert x.grad is not None
    assert len(solved) == 1


class ToTheFirst:
    """A decision that can be mixed into any router."""

    def select(self, logits: Tensor, scores: Tensor, tokens: Tokens) -> Tensor:
        return torch.zeros(logits.shape[0], self.top_k, dtype=torch.int32)


class MixedIn(ToTheFirst, SoftmaxRouter):
    """The mixin comes first."""


class NamedAndOverridden(Router):
    """Names a score function, and decides in its own way all the same."""

    score_function = ScoreFunction.SOFTMAX
    select = ToTheFirst.select

    def score(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


@pytest.mark.parametrize("kind", [MixedIn, NamedAndOverridden])
def test_a_decision_of_ones_own_is_what_runs_wherever_it_comes_from(kind: type[Router]) -> None:
    assert (made(kind)(torch.randn(9, 16)).expert_ids == 0).all()


def test_a_subclass_that_names_its_score_function_is_fused() -> None:
    class Named(Router):
        """Its ``score`` is what the name says, so that nothing needs to call it."""

        score_function = ScoreFunction.SIGMOID

        def score(self, logits: Tensor) -> Tensor:
            raise AssertionError("not called")

    x = torch.randn(9, 16)
    assert torch.equal(made(Named)(x).weights, made(SigmoidRouter)(x).weights)


def test_groups_bound_where_a_token_goes() -> None:
    x = torch.randn(200, 16)
    free, bound = made(SigmoidRouter), made(SigmoidRouter, num_groups=4, top_groups=1)
    groups = bound(x).expert_ids // 3
    assert (groups == groups[:, :1]).all()
    assert not torch.equal(bound(x).expert_ids, free(x).expert_ids)
    everywhere = made(SigmoidRouter, num_groups=4, top_groups=4)
    assert torch.equal(everywhere(x).expert_ids, free(x).expert_ids)


def test_a_group_is_as_good_as_its_two_best() -> None:
    router = SigmoidRouter(6, 6, 1, num_groups=2, top_groups=1)
    with torch.no_grad():
        router.weight.copy_(torch.eye(6))
    # The best expert is 0, but the group of 3, 4 and 5 has the better pair.
    assert router(torch.tensor([[2.0, -4.0, -4.0, 1.5, 1.0, -4.0]])).expert_ids.item() == 3


def test_a_layer_takes_the_options_by_name() -> None:
    router = {"name": "sigmoid", "num_groups": 4, "top_groups": 2, "batch_invariant": True}
    layer = moe.MoE(16, 8, 8, 2, router=router)
    assert (layer.router.num_groups, layer.router.top_groups, layer.router.batch_invariant) == (4, 2, True)
    assert "num_groups=4, top_groups=2, batch_invariant=True" in repr(layer.router)


@pytest.mark.parametrize("name", OWN_TOKENS_ONLY)
def test_a_batch_invariant_router_gives_a_token_the_same_bits_in_every_batch(name: str) -> None:
    router = build(name, 40, 24, 3, batch_invariant=True).eval()
    x = torch.randn(150, 40)
    ids = ids_of(x)
    whole, part = router(x, token_ids=ids), router(x[99:132], token_ids=ids[99:132])
    assert torch.equal(part.logits, whole.logits[99:132])
    assert torch.equal(part.expert_ids, whole.expert_ids[99:132])
    assert torch.equal(part.weights, whole.weights[99:132])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 4}, "num_groups=4 and top_groups=None must be given together"),
        ({"top_groups": 4}, "num_groups=None and top_groups=4 must be given together"),
        ({"num_groups": 5, "top_groups": 1}, "num_groups=5 must divide num_experts=12"),
        ({"num_groups": 0, "top_groups": 1}, "num_groups=0 must be positive"),
        ({"num_groups": 4, "top_groups": 2.0}, "top_groups=2.0 must be a whole number"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups=5 must be at most num_groups=4"),
        ({"num_groups": 6, "top_groups": 1}, "top_k=3 is more than the 2 experts in top_groups=1 groups"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_groups_that_do_not_fit_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(SoftmaxRouter, **options)
