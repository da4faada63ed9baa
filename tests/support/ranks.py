"""One call of the dispatcher on every rank of a group, and the same by one process; the ranks import this file."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from moe.balance import in_backward
from moe.dispatch import Dispatcher
from moe.experts import GroupedExperts
from moe.parallel.dispatcher import ExpertParallel, even_bounds
from moe.parallel.hierarchical import Hierarchical
from moe.parallel.rounds import Round
from moe.types import Routing
from tests.support.oracle import experts_oracle

# Of a tensor's largest magnitude. float64 and float32: a few hundred additions. bfloat16: the rows, the experts' output
# and the partial rows round to 2^-9 each, and a token adds up to four partial rows.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-5}


@dataclass(frozen=True)
class Case:
    """What each rank of a group does with the tokens it has."""

    tokens: tuple[int, ...]
    """Of each rank; there are as many ranks."""
    num_experts: int = 6
    top_k: int = 2
    dim: int = 8
    chosen: str = "random"
    """Which experts: "random", "first" (expert 0 for all), "even" (none for an odd expert), "few" (a third are -1)."""
    dtype: torch.dtype = torch.float64
    chunks: int = 1
    limit: int | None = None
    copies: int = 1
    """Each copy of an expert yields an equal part of its output."""
    frozen: tuple[str, ...] = ()
    """Of "x", "weights", "experts": on all ranks."""
    frozen_on_last: tuple[str, ...] = ()
    """The same on the last rank only."""
    strided: bool = False
    """Tokens are not contiguous."""
    backward: str = "once"
    """"once", "twice" (over a kept graph) or "none" (without gradients)."""

    @property
    def bounds(self) -> tuple[int, ...]:
        return even_bounds(self.num_experts, len(self.tokens) // self.copies)

    def leaves(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, weights and ids of a rank."""
        random = torch.Generator().manual_seed(rank)
        T, K, E = self.tokens[rank], self.top_k, self.num_experts
        x = torch.randn(self.dim, T, generator=random, dtype=torch.float64).to(self.dtype)
        exact = torch.promote_types(self.dtype, torch.float32)
        weights = torch.rand(T, K, generator=random, dtype=torch.float64).to(exact)
        ids = torch.rand(T, E, generator=random).argsort(1)[:, :K].int()
        if self.chosen == "first":
            ids = torch.full_like(ids, -1)
            ids[:, 0] = 0
        elif self.chosen == "even":
            ids = ids.where(ids % 2 == 0, -1)
        elif self.chosen == "few":
            ids = ids.where(torch.rand(T, K, generator=random) > 1 / 3, -1)
        return (x.T if self.strided else x.T.contiguous()), weights.where(ids >= 0, 0.0), ids

    def experts(self) -> GroupedExperts:
        torch.manual_seed(0)
        return GroupedExperts(self.num_experts, self.dim, 5, dtype=torch.float64).to(self.dtype)

    def needs(self, name: str, rank: int) -> bool:
        last = rank == len(self.tokens) - 1
        return name not in self.frozen and not (last and name in self.frozen_on_last)


@dataclass(frozen=True)
class Outcome:
    """What a rank has after its call; a gradient that was not asked for is None."""

    y: Tensor
    gradients: dict[str, Tensor | None]
    received: list[int]
    """Rows at each call of the experts, in forward and then in backward."""
    forward_calls: int
    kept: int
    """Of the rows that came in forward, how many were still in memory when it ended."""
    requires_grad: bool


def dispatch(case: Case) -> Outcome:
    """On a rank of the world."""
    group = dist.group.WORLD
    assert group is not None
    return dispatch_in(case, ExpertParallel(group, case.bounds, case.copies, 1.0, case.chunks, case.limit))


def dispatch_in(case: Case, dispatcher: Dispatcher) -> Outcome:
    """On a rank, through any dispatcher that reaches the experts of the others."""
    rank = dist.get_rank()
    x, weights, ids = case.leaves(rank)
    x.requires_grad_(case.needs("x", rank))
    weights.requires_grad_(case.needs("weights", rank))
    holder = rank // case.copies
    own = slice(case.bounds[holder], case.bounds[holder + 1])
    experts = case.experts()
    for name, parameter in list(experts.named_parameters()):
        part = torch.nn.Parameter(parameter.detach()[own].clone(), case.needs("experts", rank))
        setattr(experts, name, part)
    received: list[int] = []
    held: list[weakref.ref] = []

    def watched(rows: Tensor, routing: Routing) -> Tensor:
        received.append(len(rows))
        held.append(weakref.ref(rows.untyped_storage()))
        return experts(rows, routing) / case.copies

    nothing = weights.new_empty(len(ids), 0)
    with torch.set_grad_enabled(case.backward != "none"):
        y = dispatcher.run(watched, x, Routing(ids, weights, nothing, nothing))
    forward_calls = len(received)
    kept = sum(rows for rows, storage in zip(received, held) if storage() is not None)
    if y.requires_grad:
        for again in range(2 if case.backward == "twice" else 1):
            y.backward(gradient_of(case, rank), retain_graph=case.backward == "twice" and not again)
    leaves = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    return Outcome(y.detach(), gradients, received, forward_calls, kept, y.requires_grad)


def dispatch_all(cases: list[Case]) -> list[Outcome]:
    """One case after another, on a rank."""
    return [dispatch(case) for case in cases]


def gradient_of(case: Case, rank: int) -> Tensor:
    """Of the loss, by a rank's outputs."""
    random = torch.Generator().manual_seed(100 + rank)
    return torch.randn(case.tokens[rank], case.dim, generator=random, dtype=torch.float64).to(case.dtype)


def expected(case: Case) -> list[Outcome]:
    """The same by one process in float64: every rank's tokens through every expert."""
    experts, ranks = case.experts().double(), range(len(case.tokens))
    inputs = [case.leaves(rank) for rank in ranks]
    x = torch.cat([each[0].double() for each in inputs]).requires_grad_()
    weights = torch.cat([each[1].double() for each in inputs]).requires_grad_()
    ids = torch.cat([each[2] for each in inputs])
    nothing = weights.new_empty(len(ids), 0)
    y = experts_oracle(experts, x, Routing(ids, weights, nothing, nothing))
    times = {"once": 1, "twice": 2, "none": 0}[case.backward]
    (y * torch.cat([gradient_of(case, rank).double() for rank in ranks])).sum().backward()
    outcomes = []
    parts = {name: leaf.grad.split(case.tokens) for name, leaf in (("x", x), ("weights", weights))}
    for rank, own_y in enumerate(y.detach().split(case.tokens)):
        first, end = case.bounds[rank // case.copies], case.bounds[rank // case.copies + 1]
        gradients = {name: parts[name][rank] for name in parts}
        gradients |= {name: p.grad[first:end] / case.copies for name, p in experts.named_parameters()}
        for name in gradients:
            asked = case.needs(name if name in parts else "experts", rank) and times
            gradients[name] = gradients[name] * times if asked else None
        outcomes.append(Outcome(own_y, gradients, [], 0, 0, bool(times)))
    return outcomes


def dispatch_over_nodes(cases: list[Case], node_size: int) -> list[tuple[Outcome, int, int]]:
    """On a rank: each case through two hops, with the rows that went to another node; and how many did in one hop."""
    world = dist.group.WORLD
    assert world is not None
    nodes = [list(range(first, first + node_size)) for first in range(0, world.size(), node_size)]
    within = [dist.new_group(ranks) for ranks in nodes][dist.get_rank() // node_size]
    across = [dist.new_group(list(ranks)) for ranks in zip(*nodes)][dist.get_rank() % node_size]
    outcomes = []
    for case in cases:
        flat = ExpertParallel(world, case.bounds, case.copies, 1.0, case.chunks, case.limit)
        results = []
        for dispatcher in (Hierarchical.split(flat, across, within), flat):
            with watched_rows() as sent:
                outcome = dispatch_in(case, dispatcher)
            places = [(dist.get_global_rank(group, to) // node_size, rows) for group, to, rows in sent]
            results.append((outcome, sum(rows for node, rows in places if node != dist.get_rank() // node_size)))
        outcomes.append((results[0][0], results[0][1], results[1][1]))
    return outcomes


@contextmanager
def watched_rows() -> Iterator[list[tuple[dist.ProcessGroup, int, int]]]:
    """The rows that this rank sends off with new tokens, in forward: group, rank in it, number."""
    sent: list[tuple[dist.ProcessGroup, int, int]] = []
    original = ExpertParallel._send

    def send(self: ExpertParallel, each: Round, *tensors: Tensor) -> object:
        if not in_backward():
            sent.extend((self.group, to, rows) for to, rows in enumerate(each.sent))
        return original(self, each, *tensors)

    with patch.object(ExpertParallel, "_send", send):
        yield sent


def require_equal(case: Case, got: list[Outcome]) -> None:
    """Fail unless outputs and gradients are those of one process, in the dtypes that they must have."""
    for rank, (ours, theirs) in enumerate(zip(got, expected(case), strict=True)):
        pairs = {"y": (ours.y, theirs.y)}
        assert ours.gradients.keys() == theirs.gradients.keys()
        pairs |= {name: (ours.gradients[name], theirs.gradients[name]) for name in theirs.gradients}
        for name, (value, wanted) in pairs.items():
            assert (value is None) == (wanted is None), (rank, name)
            if value is not None and wanted is not None:
                assert value.dtype == (case.leaves(0)[1].dtype if name == "weights" else case.dtype)
                scale = wanted.abs().amax().item() if wanted.numel() else 0.0
                torch.testing.assert_close(value.double(), wanted, rtol=0, atol=TOLERANCE[case.dtype] * scale)
