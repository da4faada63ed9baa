"""Whole tensors out of parts: what ranks disagree about is seen, a NaN too."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe
from moe.parallel import Degrees, ParallelMesh, parallelize
from moe.parallel.gather import gather
from moe.parallel.local_ranks import run_local


def disagreements(odd_rank: int, odd: float) -> dict[str, float]:
    """By name, of tensors of ones, of which one rank holds something else."""
    torch.manual_seed(0)
    parallel = parallelize(moe.MoE(8, 4, 4, 2), ParallelMesh(Degrees.parse("tp=2,ep=2", 2)))

    def of(parameter: Tensor) -> Tensor:
        return torch.full_like(parameter, odd if dist.get_rank() == odd_rank else 1.0)

    return {whole.name: whole.disagreement for whole in gather(parallel, of)}


@pytest.mark.parametrize("odd_rank", [0, 1])
def test_ranks_that_hold_the_same_part_are_compared(odd_rank: int) -> None:
    found, _ = run_local(disagreements, 2, (odd_rank, 1.25))
    assert found["router.weight"] == 0.25
    assert found["experts.up_weight"] == 0  # each rank holds other experts


@pytest.mark.parametrize("odd_rank", [0, 1])
def test_a_nan_on_one_rank_is_a_disagreement(odd_rank: int) -> None:
    found, _ = run_local(disagreements, 2, (odd_rank, math.nan))
    assert math.isnan(found["router.weight"])
