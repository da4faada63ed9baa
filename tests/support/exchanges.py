"""What ranks do in the tests of exchanges and of errors; imported by the ranks themselves."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe
from moe.errors import ConfigError, MoEError, ParallelError, ShapeError
from moe.parallel import Degrees, ParallelMesh, parallelize, split_batch
from moe.parallel.dispatcher import ExpertParallel
from moe.parallel.exchange import Transfer, arrive, depart
from moe.parallel.gather import gather
from moe.types import Routing
from tests.support.ranks import Case, dispatch


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def exchange_twice() -> tuple[Tensor, Tensor, Tensor, str]:
    """One exchange; its gradient once and again over the kept graph, and what is said to a gradient of a gradient."""
    rank = dist.get_rank()
    x = torch.arange(3.0).add(10 * rank).double()[:, None].requires_grad_()
    transfer = Transfer(world(), [1, 2] if rank == 0 else [3, 0], [1, 3] if rank == 0 else [2, 0])
    (y,) = arrive(transfer, *depart(transfer, x))
    loss = (y.square() * (rank + 1)).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    (kept,) = torch.autograd.grad(loss, x, create_graph=True)
    try:
        kept.sum().backward()
        said = "nothing"
    except RuntimeError as error:
        said = str(error)
    return y.detach(), first, second, said


def order_of_calls(chunks: int, limit: int | None) -> list[str]:
    """What a rank begins, waits for and computes, in its order, in forward."""
    done: list[str] = []
    begin, wait = Transfer.begin, Transfer.wait

    def watched_begin(self: Transfer, tensors: Any, **options: Any) -> Any:
        done.append("go" if len(tensors) == 2 else "return")
        return begin(self, tensors, **options)

    def watched_wait(self: Transfer) -> Any:
        arrived = wait(self)
        done.append("arrived" if len(arrived) == 2 else "returned")
        return arrived

    def experts(rows: Tensor, _routing: Routing) -> Tensor:
        done.append("experts")
        return rows * 1.0

    ids = torch.tensor([[0], [1], [0], [1]], dtype=torch.int32)
    weights = torch.ones(4, 1, dtype=torch.float64)
    nothing = weights.new_empty(4, 0)
    with patch.object(Transfer, "begin", watched_begin), patch.object(Transfer, "wait", watched_wait):
        dispatcher = ExpertParallel(world(), (0, 1, 2), chunks=chunks, max_received_tokens=limit)
        dispatcher.run(experts, torch.ones(4, 2, dtype=torch.float64), Routing(ids, weights, nothing, nothing))
    return done


class Tower(nn.Module):
    """Two layers, which backward computes once more unless it is "kept"."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"bias": True, "dtype": torch.float64}
        self.parts = nn.ModuleList(moe.MoE(6, 4, 5, 2, **options) for _ in range(2))

    def forward(self, x: Tensor, mode: str) -> Tensor:
        for part in self.parts:
            x = x + (part(x) if mode == "kept" else checkpoint(part, x, use_reentrant=mode == "reentrant"))
        return x


def checkpointed(mode: str, rows: tuple[int, ...], options: dict[str, Any]) -> dict[str, float]:
    """Two layers over all ranks; how far every gradient is from that of one process, on rank 0."""
    degrees = Degrees.parse({"ep": dist.get_world_size(), "dp_shard": dist.get_world_size()})
    layers, alone = Tower(), Tower()
    parallel = parallelize(layers, ParallelMesh(degrees), blocks=[], **options)
    losses = []
    for rank, number in enumerate(rows):
        x = torch.randn(number, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        x.requires_grad_()
        losses.append(alone(x, "kept").square().sum() + moe.balance_loss(alone))
        if rank == dist.get_rank():
            (layers(x.detach().requires_grad_(), mode).square().sum() + moe.balance_loss(layers)).backward()
    (torch.stack(losses).sum() / len(rows)).backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}
    found = {}
    for whole in gather(parallel, lambda p: p.grad):
        wanted = expected[whole.name]
        found[whole.name] = (whole.tensor - wanted).abs().max().item() / wanted.abs().max().item()
    return found


def one_rank_fails(folder: str) -> str:
    """Rank 1 fails before its exchange, and lives on; what rank 0 hears meanwhile."""
    store = dist.FileStore(f"{folder}/store", 2)
    said = "nothing"
    try:
        if dist.get_rank() == 1:
            raise ValueError("bad data on rank 1")
        dispatch(Case((3, 3)))
    except (RuntimeError, ValueError) as error:
        said = str(error)
    store.set(str(dist.get_rank()), said)
    store.wait([str(1 - dist.get_rank())])
    Path(folder, f"said{dist.get_rank()}").write_text(said)
    raise ParallelError("over")  # the group is of no more use


def different_calls() -> list[str]:
    """What each rank hears where rank 1 calls a layer in another way."""
    said = []
    changes: list[dict[str, Any]] = [{"dtype": torch.bfloat16}, {"backward": "none"}, {"top_k": 3}, {"dim": 6}]
    for change in changes:
        case = (
            Case((3, 3), dtype=torch.float32)
            if dist.get_rank() == 0
            else Case((3, 3), **{"dtype": torch.float32} | change)
        )
        try:
            dispatch(case)
        except ParallelError as error:
            said.append(str(error))
    return said


def different_settings(change: dict[str, Any], options: dict[str, Any]) -> str:
    """What each rank hears of parallelize where the last has another model or other options."""
    last = dist.get_rank() == dist.get_world_size() - 1
    model = moe.MoE(**{"dim": 6, "hidden_dim": 4, "num_experts": 4} | (change if last else {}))
    try:
        parallelize(model, ParallelMesh(Degrees.parse("ep=2")), **(options if last else {}))
    except ConfigError as error:
        return str(error)
    return "nothing"


def refusals() -> list[str]:
    """What a world of two ranks is told about things that it cannot do."""

    def said(function: Any) -> str:
        try:
            function()
        except MoEError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    mesh = ParallelMesh(Degrees(dp_shard=2, ep=2))
    divided = ParallelMesh(Degrees(dp_shard=2, etp=2))
    return [
        said(lambda: ParallelMesh(Degrees(dp_shard=3))),
        said(lambda: ParallelMesh(Degrees(dp_shard=2, ep=2), node_size=3)),
        said(lambda: ParallelMesh(Degrees(dp_shard=2, etp=2), node_size=1)),
        said(lambda: parallelize(moe.MoE(6, 4, 1, 1), mesh)),
        said(lambda: parallelize(moe.MoE(6, 1, 4, 1), divided)),
        said(lambda: parallelize(moe.MoE(6, 4, 4, 1), mesh, max_received_tokens=1)),
        said(lambda: parallelize(moe.MoE(6, 4, 4, 1), mesh, chunks=0)),
        said(lambda: split_batch({"ids": torch.zeros(4, 3), "labels": torch.zeros(3)}, mesh)),
        said(lambda: split_batch({"scale": torch.tensor(1.0)}, mesh)),
    ]


def own_rows() -> dict[str, Tensor]:
    """This data rank's part of a batch of six rows, two ranks of four seeing the same."""
    mesh = ParallelMesh(Degrees(dp_shard=2, tp=2))
    try:
        return split_batch({"ids": torch.arange(12).view(6, 2), "empty": torch.zeros(0, 3)}, mesh)
    except ShapeError as error:
        raise AssertionError from error


def shared_tokens(rows: int) -> list[tuple[float, float]]:
    """Two layers whose tokens both ranks have; how far output and gradients are from those of one process."""
    mesh = ParallelMesh(Degrees(tp=2, ep=2))
    layers, alone = Tower(), Tower()
    parallelize(layers, mesh, blocks=[])
    found = []
    for tower in (alone, layers):
        x = torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = tower(x, "kept")
        (y.square().sum() + moe.balance_loss(tower)).backward()
        assert x.grad is not None
        found.append((y.detach(), x.grad, tower.parts[0].router.weight.grad))
    return [((a - b).abs().max().item() if a.numel() else 0.0, a.abs().sum().item()) for a, b in zip(*found)]
