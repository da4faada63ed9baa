"""The small parts of training: optimizer groups, evaluation, pooled loads."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import moe
from moe.monitor import LoadStats
from moe.training.data import eval_batches
from moe.training.evaluate import evaluate
from moe.training.load_pool import LoadPool
from moe.training.optim import make_optimizer
from moe.training.runner import OneDevice

CPU = torch.device("cpu")


def test_only_matrices_decay():
    model = nn.ModuleDict({"moe": moe.MoE(8, 8, 4, bias=True), "norm": nn.LayerNorm(8), "linear": nn.Linear(8, 8)})
    optimizer = make_optimizer(model, peak=0.1, weight_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, value in decay.items() if value == 0} == {
        "moe.experts.up_bias", "moe.experts.down_bias", "norm.weight", "norm.bias", "linear.bias"
    }  # fmt: skip
    assert set(decay) == set(names.values())


class Unigram(nn.Module):
    """Knows nothing but the frequency of each token."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


def test_bits_per_byte_by_hand():
    """Tokens of 1, 2 and 0 bytes; a model that gives them 1/2, 1/4 and 1/4 needs 1, 2 and 2 bits."""
    tokens = np.array([0, 0, 1, 2, 0, 1, 0, 1, 1], dtype=np.uint16)
    model = Unigram(torch.tensor([0.5, 0.25, 0.25]).log()).train()
    batches = eval_batches(tokens, seq_len=4, batch_size=1)
    found = evaluate(OneDevice(model), batches, np.array([1, 2, 0]), CPU, nullcontext())
    bits, size = (1 + 2 + 2 + 1 + 2 + 1 + 2 + 2), (1 + 2 + 0 + 1 + 2 + 1 + 2 + 2)
    assert found.bits_per_byte == pytest.approx(bits / size, rel=1e-6)
    assert found.loss == pytest.approx(bits * math.log(2) / 8, rel=1e-6)
    assert model.training


def test_evaluation_counts_its_own_load_only():
    layer = moe.MoE(4, 4, 2, 1).eval()
    layer(torch.randn(5, 4))  # somebody else's

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, nn.Linear(4, 3)

        def forward(self, tokens):
            return self.head(self.layer(nn.functional.one_hot(tokens, 4).float()))

    model, tokens = Model(), np.array([0, 1, 2, 0, 1], dtype=np.uint16)
    found = evaluate(OneDevice(model), eval_batches(tokens, 4, 1), np.ones(3, dtype=np.int64), CPU, nullcontext())
    with torch.no_grad():
        ids = layer.router(nn.functional.one_hot(torch.from_numpy(tokens[:4].astype(np.int64)), 4).float()).expert_ids
    expected = torch.bincount(ids.flatten(), minlength=2).max().item() / 2 - 1
    assert found.max_vio == {"layer": pytest.approx(expected)}


def stats(counts):
    total = torch.tensor(sum(counts))
    return LoadStats(torch.tensor(counts), torch.tensor(1), total, total * 0.5)


def test_the_pool_forgets_old_steps():
    pool = LoadPool(2)
    for counts in ([100, 0], [3, 1], [1, 3]):
        pool.add({"a": stats(counts)})
    line = pool.measures()
    assert line["balance/load/a"] == [0.5, 0.5]
    assert line["balance/max_vio/a"] == 0
    assert line["balance/drop_rate/a"] == pytest.approx(2 / 8)
    assert line["balance/confidence/a"] == pytest.approx(0.5)


def test_the_pool_survives_a_checkpoint():
    pool, other = LoadPool(3), LoadPool(3)
    for counts in ([100, 0], [3, 1], [1, 3]):
        pool.add({"a": stats(counts)})
    other.load_state_dict(pool.state_dict(), CPU)
    assert other.measures() == pool.measures()
    for p in (pool, other):
        p.add({"a": stats([7, 7])})
    assert other.measures() == pool.measures()


def test_an_empty_pool_measures_nothing():
    assert LoadPool(3).measures() == {}
