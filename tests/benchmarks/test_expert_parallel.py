"""The benchmark of expert parallelism: from end to end on a tiny case, and what it counts held against a hand."""

from dataclasses import replace

import expert_parallel
import pytest
import torch
import torch.distributed as dist
from measure.oracle import compute_truth
from measure.timing import Times
from parallel import trial
from parallel.overlap import common, measure_overlap, merge, total
from parallel.plain import OneCopyAnExpert
from parallel.tables import slowest, targets
from parallel.traffic import Reach, Traffic, count_sent
from peers.contestant import Case, make_problem

from moe.errors import ParallelError
from moe.parallel import Degrees, ParallelMesh
from moe.parallel.dispatcher import ExpertParallel
from moe.parallel.local_ranks import run_local
from moe.types import Routing

TINY = [
    f"shapes.{case}.{size}"
    for case in ("few", "few_skewed")
    for size in ("tokens=24", "dim=32", "hidden_dim=8", "num_experts=6", "top_k=3")
]


@pytest.mark.slow
def test_the_result_has_a_table_for_every_case_and_number_of_processes(tmp_path):
    arguments = [*TINY, "cases=[few,few_skewed]", "processes=[2,3]", "rounds=1", "profiled=1", f"results={tmp_path}"]
    assert expert_parallel.main(arguments) == 0
    (result,) = tmp_path.glob("expert_parallel_float32_2-3ranks_*.md")
    text = result.read_text()
    assert f"`python benchmarks/expert_parallel.py {' '.join(TINY)} cases=" in text
    assert f"torch {torch.__version__}" in text
    sections = text.split("\n## ")[1:]
    assert [(each.split(":")[0], each.split(", ")[1][0]) for each in sections] == [
        (case, size) for size in "23" for case in ("few", "few_skewed")
    ]
    for section in sections:
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()]
        for name in ("ours, chunks=1", "ours, chunks=2"):
            (sent, times, overlap), (plain, *_) = ([row for row in rows if row[0] == each] for each in (name, "plain"))
            target = float(section.split("target ")[1].split()[0])
            assert float(sent[1].replace(",", "")) / float(plain[1].replace(",", "")) == pytest.approx(target, abs=1e-4)
            # What describes a row of 32 numbers weighs a few per cent here, and less the wider a row is.
            assert 1 < float(sent[6]) < 1.2
            assert 1 < float(sent[9]) < 1.2
            assert float(times[1]) > 0
            assert float(times[3]) > 0
            # Same numbers, summed by rank instead of by choice: a few rounding errors of float32.
            assert 0 < float(times[5]) < 1e-6
            assert 0 < float(times[6]) < 1e-6
            assert float(overlap[3]) <= min(float(overlap[1]), float(overlap[2]))
    with pytest.raises(SystemExit, match="exists; move it away"):
        expert_parallel.main(arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("cases=[none]", "cases=none is unknown; choose from few, few_skewed, many, many_skewed"),
        ("round=3", "Could not override 'round'"),
        ("rounds=0", "rounds=0 must be whole numbers of at least 1"),
        ("processes=[1]", r"processes=\[1\] must be whole numbers of at least 2"),
        ("processes=[]", r"processes=\[\] must be whole numbers"),
        ("chunks=[1.5]", r"chunks=\[1.5\] must be whole numbers of at least 1"),
        ("processes=[32]", r"processes=\[32\] is more than num_experts=16 of few"),
    ],
)
def test_settings_that_cannot_be_say_so(argument, message):
    with pytest.raises(SystemExit, match=message):
        expert_parallel.read_settings([argument])


CASE = Case("uneven", tokens=7, dim=12, hidden_dim=6, num_experts=5, top_k=3, skew=1.0)


def steps_of_all():
    mesh = ParallelMesh(Degrees(dp_shard=dist.get_world_size(), ep=dist.get_world_size()))
    contestants = trial.make_contestants(trial.part_of_rank(CASE, seed=3), [1, 2], mesh)
    return {name: trial._step_once(contestant) for name, contestant in contestants.items()}


def test_all_contestants_compute_the_mixture():
    size = 3  # which have 1, 2 and 2 of the experts
    whole = make_problem(replace(CASE, tokens=7 * size), torch.float32, "cpu", seed=3)
    whole.router_weight[:, 0] = whole.router_weight[:, 0].sort(descending=True).values
    truth = compute_truth(whole)
    by_rank = run_local(steps_of_all, size)
    for name in by_rank[0]:
        y, x, up, down, router = zip(*(ranks[name] for ranks in by_rank))
        # Experts have the mean over ranks; a router's gradient is of its own rank's tokens.
        found = {"x": torch.cat(x), "up": torch.cat(up) * size, "down": torch.cat(down) * size, "router": sum(router)}
        torch.testing.assert_close(torch.cat(y).double(), truth.y, rtol=1e-4, atol=1e-5)
        for key, gradient in found.items():
            torch.testing.assert_close(gradient.double(), truth.gradients[key], rtol=1e-4, atol=1e-5)


IDS = torch.tensor([[0, 2], [1, 0], [3, -1]], dtype=torch.int32)
"""The example of both dispatchers' documentation: two ranks with two experts each."""


def sent_in_the_example():
    def experts(rows, routing):
        return rows * routing.weights.sum(1, keepdim=True)

    weights = torch.rand(3, 2).where(IDS >= 0, 0.0).requires_grad_()
    x = torch.randn(3, 8, requires_grad=True)
    nothing = torch.empty(3, 0)
    sent = []
    for dispatcher in (OneCopyAnExpert(dist.group.WORLD, (0, 2, 4)), ExpertParallel(dist.group.WORLD, (0, 2, 4))):

        def step(dispatcher=dispatcher):
            dispatcher.run(experts, x, Routing(IDS, weights, nothing, nothing)).sum().backward()

        sent.append(count_sent(step, dim=8))
    return sent


def test_bytes_are_those_counted_by_hand():
    plain, ours = run_local(sent_in_the_example, 2)[0]
    row = 8 * 4
    # Tokens 0, 1, 1 to rank 0 and 0, 2 to rank 1; three from each rank go back. Then the same again with gradients.
    assert (plain["rows"].everywhere, plain["rows"].elsewhere) == (2 * (5 + 6) * row, 2 * (2 + 3) * row)
    # Tokens 0, 1 to rank 0 and 0, 2 to rank 1; two from each rank go back.
    assert (ours["rows"].everywhere, ours["rows"].elsewhere) == (2 * (4 + 4) * row, 2 * (2 + 2) * row)
    assert plain["ids and weights"].everywhere == 0
    assert 0 < ours["ids and weights"].elsewhere < ours["rows"].elsewhere
    assert plain["counts"].everywhere == 4 * 4
    assert 0 < ours["counts"].elsewhere <= ours["counts"].everywhere // 2


def reduce_uncounted():
    with Traffic(dim=8):
        dist.all_reduce(torch.ones(1))


def test_a_collective_that_nobody_counts_is_an_error():
    with pytest.raises(ParallelError, match="allreduce_ is a collective that nobody counts here"):
        run_local(reduce_uncounted, 1)


def test_reach_of_the_example():
    assert Reach.of(IDS, (0, 2, 4), rank=0) == Reach(5 / 3, 4 / 3, 2 / 3, 2 / 3)
    assert Reach.of(IDS, (0, 2, 4), rank=1) == Reach(5 / 3, 4 / 3, 3 / 3, 2 / 3)


def trial_of(reach=None, steps=()):
    return trial.Trial(reach, 0, {}, {}, {}, {"ours": Times(list(steps), list(steps))}, {})


def test_targets_and_times_are_of_all_ranks():
    ranks = [trial_of(Reach.of(IDS, (0, 2, 4), rank), steps) for rank, steps in enumerate([(1.0, 4.0), (3.0, 2.0)])]
    assert targets(ranks) == pytest.approx((4 / 5, 4 / 5))
    assert slowest(ranks, "ours") == Times([3.0, 4.0], [3.0, 4.0])


def test_spans_are_merged_and_what_they_have_in_common_is_found():
    spans = [(5.0, 6.0), (0.0, 3.0), (1.0, 2.0), (3.0, 4.0)]
    assert merge(spans) == [(0.0, 4.0), (5.0, 6.0)]
    assert common(merge(spans), [(3.5, 5.5), (7.0, 8.0)]) == [(3.5, 4.0), (5.0, 5.5)]
    assert total(merge(spans)) == 5.0


def test_an_overlap_of_nothing_is_an_error():
    with pytest.raises(RuntimeError, match=r"the profiler saw none of moe::experts, .* in 2 steps"):
        measure_overlap(lambda: torch.ones(2).sum(), 2)
