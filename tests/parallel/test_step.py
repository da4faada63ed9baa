"""What begins and ends a step on a rank: its rows of a batch, and norms of other orders than two."""

import copy
import math

import pytest
import torch
from torch import nn

import moe
from moe.parallel import Degrees, ParallelMesh, parallelize, split_batch
from moe.parallel.local_ranks import run_local

SPEC = "dp_shard=2,tp=2,ep=2"
ORDERS = (1.0, 2.0, 3.0, math.inf)
NO_LIMIT = 1e9


def whole_batch() -> torch.Tensor:
    return torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step() -> tuple[torch.Tensor, dict[float, tuple[float, float]], int]:
    """On a rank: its rows, norms by their order with those of one process, and its data rank."""
    mesh = ParallelMesh(Degrees.parse(SPEC))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), moe.MoE(8, 10, 5, 2, balance=())).double()
    alone = copy.deepcopy(model)
    parallel = parallelize(model, mesh)
    batch = {"x": whole_batch()}
    rows = split_batch(batch, mesh)["x"]
    model(rows).square().mean().backward()
    alone(batch["x"]).square().mean().backward()
    norms = {}
    for order in ORDERS:
        expected = nn.utils.clip_grad_norm_(alone.parameters(), NO_LIMIT, order).item()
        norms[order] = (parallel.clip_grad_norm_(NO_LIMIT, order).item(), expected)
    return rows, norms, mesh.data_rank


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[torch.Tensor, dict[float, tuple[float, float]], int]]:
    return run_local(step, Degrees.parse(SPEC).world_size, timeout=60)


def test_data_ranks_have_consecutive_rows_and_all_of_them(outcomes):
    by_data_rank = {data_rank: rows for rows, _, data_rank in outcomes}
    assert torch.equal(torch.cat([by_data_rank[0], by_data_rank[1]]), whole_batch())
    assert all(torch.equal(rows, by_data_rank[data_rank]) for rows, _, data_rank in outcomes)


@pytest.mark.parametrize("order", ORDERS)
def test_norms_of_every_order_are_those_of_one_process(outcomes, order):
    for _, norms, _ in outcomes:
        got, expected = norms[order]
        assert got == pytest.approx(expected, rel=1e-12)
    assert len({norms[order][0] for _, norms, _ in outcomes}) == 1
