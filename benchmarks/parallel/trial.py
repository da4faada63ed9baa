"""One case on one rank: agreement, bytes, time and overlap of all contestants.

Sizes: T tokens of this rank, D dim, E experts, K experts per token, G ranks.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
import torch.distributed as dist
from measure.oracle import relative_error
from measure.timing import Clock, Times, race
from peers.contestant import Case, Layer, Problem, gradient, make_problem
from torch import Tensor

import moe
from moe.dispatch import Dispatcher
from moe.parallel import Degrees, ParallelMesh
from moe.parallel.dispatcher import even_bounds
from moe.parallel.experts import shard_experts
from moe.parallel.parallelize import make_dispatcher
from parallel.overlap import Overlap, measure_overlap
from parallel.plain import OneCopyAnExpert
from parallel.traffic import Reach, Sent, count_sent

PLAIN = "plain"


@final
@dataclass(frozen=True)
class Plan:
    """How it is measured."""

    chunks: list[int]
    rounds: int
    warmup: int
    profiled: int
    seed: int


@final
@dataclass(frozen=True)
class Trial:
    """One case, as one rank saw it; each mapping by contestant."""

    reach: Reach
    """Of this rank's tokens."""
    received: int
    """Assignments to this rank's experts, from all ranks."""
    sent: dict[str, dict[str, Sent]]
    """In one step, by kind."""
    output_difference: dict[str, float]
    """To the plain one, relative."""
    gradient_difference: dict[str, float]
    """The largest of tokens, router, up and down."""
    times: dict[str, Times]
    overlap: dict[str, Overlap]


@final
class TogetherClock(Clock):
    """All ranks begin at once; how long this one takes."""

    def seconds(self, work: Callable[[], object]) -> float:
        """Between a barrier and the end here."""
        dist.barrier()
        start = time.perf_counter()
        result = work()  # a name, so that freeing it is not timed
        end = time.perf_counter()
        del result
        return end - start


def ours(chunks: int) -> str:
    """The name of our contestant."""
    return f"ours, chunks={chunks}"


def measure(plan: Plan, case: Case) -> Trial:
    """One case, on a rank of a process group whose ranks divide the experts.

    Args:
        plan: how it is measured.
        case: its tokens are those of one rank.
    """
    mesh = ParallelMesh(Degrees(dp_shard=dist.get_world_size(), ep=dist.get_world_size()))
    problem = part_of_rank(case, plan.seed)
    contestants = make_contestants(problem, plan.chunks, mesh)
    taken = {name: _step_once(contestant) for name, contestant in contestants.items()}
    output, *gradients = taken[PLAIN]
    routing = contestants[PLAIN].module.router(problem.x)  # type: ignore[operator]
    bounds = even_bounds(case.num_experts, dist.get_world_size())
    everyone = routing.tokens_per_expert()
    dist.all_reduce(everyone)
    sent = {}
    for name, contestant in contestants.items():
        contestant.ready(training=True)
        sent[name] = count_sent(contestant.step, case.dim)
    times = race(contestants, TogetherClock(), plan.rounds, plan.warmup)
    return Trial(
        Reach.of(routing.expert_ids, bounds, dist.get_rank()),
        int(everyone[bounds[dist.get_rank()] : bounds[dist.get_rank() + 1]].sum()),
        sent,
        {name: relative_error(found[0], output.double()) for name, found in taken.items()},
        {
            name: max(relative_error(mine, its.double()) for mine, its in zip(found[1:], gradients))
            for name, found in taken.items()
        },
        times,
        {name: measure_overlap(contestant.step, plan.profiled) for name, contestant in contestants.items()},
    )


def part_of_rank(case: Case, seed: int) -> Problem:
    """A problem with this rank's tokens and the same weights as everywhere.

    Hot experts stand side by side, so that what is skewed is the load of ranks, and not of experts alone.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    whole = make_problem(replace(case, tokens=case.tokens * size), torch.float32, "cpu", seed)
    router = whole.router_weight.clone()
    router[:, 0] = router[:, 0].sort(descending=True).values
    own = slice(rank * case.tokens, (rank + 1) * case.tokens)
    x, output_grad = whole.x[own].clone(), whole.output_grad[own].clone()
    return replace(whole, case=case, x=x, output_grad=output_grad, router_weight=router)


def make_contestants(problem: Problem, chunks: Sequence[int], mesh: ParallelMesh) -> dict[str, Layer]:
    """The plain one, and ours with each number of chunks; on parameters of their own that are alike."""
    bounds = even_bounds(problem.case.num_experts, dist.get_world_size())
    makers: dict[str, Callable[[moe.MoE], Dispatcher]] = {PLAIN: lambda _: OneCopyAnExpert(mesh.exchange, bounds)}
    for number in chunks:
        makers[ours(number)] = lambda layer, number=number: make_dispatcher(layer, mesh, number, None)  # type: ignore[misc]
    return {name: _contestant(problem, mesh, make, name == PLAIN) for name, make in makers.items()}


def _contestant(problem: Problem, mesh: ParallelMesh, make: Callable[[moe.MoE], Dispatcher], is_plain: bool) -> Layer:
    case = problem.case
    layer = moe.MoE(case.dim, case.hidden_dim, case.num_experts, case.top_k, balance=(), dtype=problem.x.dtype)
    with torch.no_grad():
        layer.router.weight.copy_(problem.router_weight)
        layer.experts.up_weight.copy_(problem.up_weight)
        layer.experts.down_weight.copy_(problem.down_weight)
    shard_experts(layer.experts, mesh)
    layer.dispatcher = make(layer)
    # Ours takes the mean over data ranks on the way; the plain one leaves it to whoever reduces the gradients.
    scale = mesh.degrees.edp / mesh.degrees.dp if is_plain else 1.0

    def gradients() -> dict[str, Tensor]:
        up, down = gradient(layer.experts.up_weight), gradient(layer.experts.down_weight)
        return {"up": up * scale, "down": down * scale, "router": gradient(layer.router.weight)}

    return Layer(problem, layer, layer, gradients)


def _step_once(contestant: Layer) -> list[Tensor]:
    """The output and all gradients of a step."""
    contestant.ready(training=True)
    y = contestant.step().detach()
    assert contestant.gradients is not None
    assert contestant.x.grad is not None
    return [y, contestant.x.grad, *contestant.gradients().values()]
