"""Several processes under DistributedDataParallel: exact counts on all, reports from the first."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import moe
from moe.integrations import BalanceReporter
from moe.parallel import share_counts
from moe.parallel.local_ranks import run_local
from tests.integrations.loops import LR, Tiny, assert_same, by_hand, of_layers, pooled, samples


def train():
    """Four steps, of every other sample; what was reported here, the figures at the end, and the model's state."""
    model, rank, kept = Tiny(), dist.get_rank(), []
    share_counts(model, dist.group.WORLD)
    spread = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    reporter = BalanceReporter(lambda step, figures: kept.append((step, of_layers(figures))), every=2)
    for batch in samples(8)[rank::2]:
        (spread(**batch)["loss"] + moe.balance_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        reporter.add(moe.balance_step(model), report=rank == 0)
    return kept, reporter.figures(), model.state_dict()


def test_two_processes_are_one_that_sees_both_batches() -> None:
    (reported, figures, state), (silent, others_figures, others_state) = run_local(train, 2)
    other, batches = Tiny(), samples(8)
    loads = by_hand(other, [batches[start : start + 2] for start in range(0, 8, 2)])
    for found in (state, others_state):
        model = Tiny()
        model.load_state_dict(found)
        assert_same(model, other)
    # Scores are summed over ranks in steps of 2^-24, and of a hundred tokens.
    wanted = {key: pytest.approx(value, abs=1e-6) for key, value in pooled(loads[2:]).items()}
    assert reported[1] == (4, wanted)
    assert [step for step, _ in reported] == [2, 4]
    assert silent == []
    assert figures == others_figures
