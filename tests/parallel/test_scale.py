"""One rank of 1,024 without the other 1,023: what it builds, holds and says, as predicted.

The process group is torch's fake one, which moves nothing: what others would send is this rank's own. So the numbers
that a step computes mean nothing here; shapes, sizes and the collectives do.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import moe
from moe.parallel import Degrees, Parallel, ParallelMesh, parallelize
from moe.parallel.norm import local_part

DEGREES = Degrees(pp=8, dp_shard=16, tp=8, ep=64)
RANK, LAYERS, DIM, HIDDEN, EXPERTS, TOP_K, TOKENS = 777, 3, 16, 8, 128, 4, 40


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(DIM, DIM, bias=False)
        self.moe = moe.MoE(DIM, HIDDEN, EXPERTS, TOP_K, balance={"score_bias": {"rate": 0.001}})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.dense(x))


class Stage(nn.Module):
    """What a pipeline stage computes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Done:
    """A collective that is over."""

    def wait(self) -> None:
        pass


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.count[func.overloadpacket.__name__.strip("_")] += 1
        return func(*args, **(kwargs or {}))

    def all_to_all(self, arrived: Tensor, sent: Tensor, *_sizes: Any, **_options: Any) -> Done:
        """Stands in for ``all_to_all_single``: rows come from this rank's own, over and over."""
        self.count["all_to_all"] += 1
        rows = sent[torch.arange(len(arrived)) % max(1, len(sent))] if len(sent) else torch.full_like(arrived, -1)
        arrived.copy_(rows)
        return Done()


@pytest.fixture(params=[None, 8], ids=["flat", "nodes of 8"])
def spread(request: pytest.FixtureRequest) -> Iterator[Parallel]:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=DEGREES.world_size)
    try:
        yield parallelize(Stage(), ParallelMesh(DEGREES, node_size=request.param))
    finally:
        dist.destroy_process_group()


def test_one_rank_of_1024(spread: Parallel) -> None:
    (model,) = spread.parts
    optimizer = torch.optim.AdamW(model.parameters())
    with Collectives() as counted, patch.object(dist, "all_to_all_single", counted.all_to_all):
        y = model(torch.randn(TOKENS, DIM))
        forward = counted.count.copy()
        y.square().mean().backward()
    backward = counted.count - forward
    with counted:
        spread.clip_grad_norm_(1.0)
        optimizer.step()
        loads = moe.balance_step(model)

    dense = (DIM * DIM + EXPERTS * DIM) // DEGREES.dp_shard
    experts = EXPERTS // DEGREES.ep * (2 * HIDDEN * DIM + DIM * HIDDEN) // DEGREES.edp
    held = [local_part(parameter) for parameter in model.parameters()]
    assert sum(part.numel() for part in held) == LAYERS * (dense + experts)
    # Adam holds two moments of each, beside the gradient; all of it in what the rank holds.
    moments = [each for state in optimizer.state.values() for each in state.values() if each.dim()]
    assert sum(local_part(each).numel() for each in moments) == 2 * LAYERS * (dense + experts)

    hops = 2 if spread.mesh.nodes else 1
    fsdp = 2  # dense parameters and experts, each over its own mesh
    assert forward == {
        "allgather_base": LAYERS * (fsdp + hops + 1),  # parameters; counts; the outputs that ranks of tp share
        "all_to_all": LAYERS * hops * 3,  # tokens, their ids and weights, outputs
    }
    assert backward == {
        "allgather_base": LAYERS * (fsdp + 2),  # gradients of tokens and of weights for the ranks of tp
        "all_to_all": LAYERS * hops * 3,
        "reduce_scatter_base": LAYERS * fsdp,
    }
    assert counted.count - forward - backward == {"allreduce": 2}  # the norm; the loads of all layers
    assert len(loads) == LAYERS
