"""A small model with a MoE layer, checkpointed in any way, for tests of what is counted and replayed."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe
from moe import RouterZLoss, ScoreBias, SquaredDeviation

KINDS = {"plain": None, "nonreentrant": False, "reentrant": True}
CHECKPOINTED = ("nonreentrant", "reentrant")


class Model(nn.Module):
    """A linear layer, a MoE layer and another linear layer, checkpointed as a whole."""

    def __init__(self, kind="plain", **options):
        super().__init__()
        torch.manual_seed(0)
        options = {"balance": (SquaredDeviation(0.1), RouterZLoss(0.01), ScoreBias(0.5))} | options
        self.first, self.moe, self.last = nn.Linear(8, 8), moe.MoE(8, 16, 6, 2, **options), nn.Linear(8, 8)
        self.kind, self.noise, self.runs = kind, 0.0, 0
        self.double()

    def body(self, x, mask=None):
        self.runs += 1
        h = self.first(x)
        if self.runs % 2 == 0:
            h = h + self.noise  # only the recomputation sees it
        return self.last(self.moe(h, mask))

    def loss_of(self, x):
        """The balance loss of one forward pass."""
        self(x)
        return moe.balance_loss(self)

    def forward(self, x, mask=None):
        if self.kind == "plain":
            return self.body(x, mask)
        return checkpoint(self.body, x, mask, use_reentrant=KINDS[self.kind])


def tokens(num_tokens=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, 8, dtype=torch.float64, generator=generator, requires_grad=True)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def train_step(model, batches, masks=None):
    """Accumulate over batches; returns the balance losses, the gradients and the load of the step."""
    losses = []
    for batch, mask in zip(batches, masks or [None] * len(batches)):
        y = model(batch, mask)
        extra = moe.balance_loss(model)
        losses.append(extra.item())
        ((y.square().mean() + extra) / len(batches)).backward()
    return losses, gradients(model), moe.balance_step(model)["moe"]
