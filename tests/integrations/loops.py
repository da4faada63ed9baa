"""What the tests of all frameworks compare with: a loop by hand, and a small model for it."""

import torch
from torch import nn

import moe

BALANCE = (moe.SquaredDeviation(0.5), moe.ScoreBias(0.01))
LR = 0.1


class Tiny(nn.Module):
    """Two MoE layers and the mean loss of a batch, float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = moe.MoE(6, 8, 5, 2, balance=BALANCE)
        self.last = moe.MoE(6, 8, 3, 1, balance=BALANCE, capacity_factor=1.0)
        self.double()

    def forward(self, x, labels=None):
        y = x + self.first(x)
        y = y + self.last(y)
        return {"y": y} if labels is None else {"loss": (y - labels).square().mean(), "y": y}


def samples(number, width=6):
    torch.manual_seed(1)
    return [{"x": row[0], "labels": row[1]} for row in torch.randn(number, 2, 7, width, dtype=torch.float64)]


def mean_loss(model, batch, _micro_batches):
    return model(**batch)["loss"]


def by_hand(model, steps, loss_of=mean_loss, divisor=None):
    """Train with SGD on the micro-batches of each step; returns the load of each step.

    The loss of a step is the mean of ``loss_of(model, batch, micro_batches)`` over its micro-batches, or their sum over
    ``divisor``. The balance loss is their mean too.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loads = []
    for micro_batches in steps:
        optimizer.zero_grad()
        for batch in micro_batches:
            share = divisor or len(micro_batches)
            ((loss_of(model, batch, micro_batches) + moe.balance_loss(model)) / share).backward()
        optimizer.step()
        loads.append(moe.balance_step(model))
    return loads


def assert_same(model, other, atol=1e-12):
    """Parameters and biases agree; the biases have moved.

    What differs is where a sum is divided: the rounding of float64 over ten steps, where not otherwise said.
    """
    for (name, value), (_, wanted) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    assert any(layer.router.score_bias.abs().max() > 0 for _, layer in moe.moe_layers(model))


def pooled(loads):
    """The figures of steps, by the names that reports have."""
    figures = {}
    for layer in loads[0]:
        total = loads[0][layer]
        for step in loads[1:]:
            total = total + step[layer]
        figures |= {f"balance/{name}/{layer}": value for name, value in total.floats().items()}
    return figures


def of_layers(figures):
    return {key: value for key, value in figures.items() if key.startswith("balance/") and "/worst/" not in key}
