"""Checkpointing by transformers: a call is decided and counted once, whatever its recomputation would decide."""

import copy

import pytest
import torch

import moe
from moe.balance import in_backward
from moe.dispatch import LocalDispatcher
from moe.routing import Router
from tests.integrations.llama import moe_llama, sentences

KINDS = {
    "contexts": {"use_reentrant": False, "context_fn": moe.checkpoint_contexts},
    "nonreentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}
# The name that every transformers from 4.57 to before 6 has; later ones prefer activation_checkpointing_enable.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

NAMES = ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.fixture
def recomputed(monkeypatch):
    """What layers are asked to carry out in recomputations, in order."""
    plain, found = LocalDispatcher.run, []

    def run(self, experts, tokens, routing):
        if in_backward():
            found.append(routing.expert_ids)
        return plain(self, experts, tokens, routing)

    monkeypatch.setattr(LocalDispatcher, "run", run)
    return found


def step(kind=None, calls=2):
    """Gradients, loads, biases and decisions of a step of so many forward and backward passes."""
    model = moe_llama()
    if kind is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KINDS[kind])
    with moe.record_routing(model) as decisions:
        for number in range(calls):
            ids, labels = (torch.stack(column) for column in zip(*(row.values() for row in sentences(3 + number))))
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            (loss + moe.balance_loss(model)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    loads = moe.balance_step(model)
    biases = {name: layer.router.score_bias for name, layer in moe.moe_layers(model)}
    return gradients, loads, biases, {name: [each.expert_ids for each in found] for name, found in decisions.items()}


def assert_counted_alike(loads, wanted):
    for name in NAMES:
        assert torch.equal(loads[name].tokens_per_expert, wanted[name].tokens_per_expert)
        assert loads[name].tokens == wanted[name].tokens == (3 + 4) * 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_without_checkpointing(kind, recomputed) -> None:
    gradients, loads, biases, decisions = step(kind)
    assert len(recomputed) == 4  # two layers, two calls: checkpointing did run
    plain_gradients, plain_loads, plain_biases, plain_decisions = step()
    assert_counted_alike(loads, plain_loads)
    for name in NAMES:
        assert torch.equal(biases[name], plain_biases[name])
        assert all(map(torch.equal, decisions[name], plain_decisions[name]))
    for name, gradient in gradients.items():
        # float64; the recomputation may add a sum's terms in another order.
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputation_that_would_decide_otherwise_does_not(kind, recomputed, monkeypatch) -> None:
    plain, changed = Router.logits, []

    def logits(self, x):
        found = plain(self, x)
        if not in_backward():
            return found
        noisy = found + torch.randn_like(found)
        best, other = (each.detach().topk(2).indices for each in (found, noisy))  # detached: a graph would be seen
        changed.append((best != other).any())
        return noisy

    monkeypatch.setattr(Router, "logits", logits)
    gradients, loads, _, decisions = step(kind)
    assert len(changed) == 4
    assert all(changed)
    # Backward goes from the last layer to the first.
    first = [decisions[name][call] for call in (0, 1) for name in reversed(NAMES)]
    assert all(map(torch.equal, recomputed, first))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    monkeypatch.undo()
    assert_counted_alike(loads, step()[1])


def test_several_open_calls_are_told_apart_by_their_contexts(monkeypatch) -> None:
    """Both passes of a contrastive loss, say, before one backward pass."""
    plain = Router.logits
    model = moe_llama(balance=())
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable(KINDS["contexts"])
    batches = [torch.stack([row["input_ids"] for row in sentences(4)[start : start + 2]]) for start in (0, 2)]

    def logits(self, x):
        found = plain(self, x)
        return found + 1e-3 * torch.randn_like(found) if in_backward() else found

    monkeypatch.setattr(Router, "logits", logits)
    for each in (model, checkpointed):
        sum(each(input_ids=ids, use_cache=False).logits.square().mean() for ids in batches).backward()
    for (name, wanted), parameter in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        # The noise goes into the weights of experts, not into the choice of them.
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=0.05, atol=1e-4, msg=name)
