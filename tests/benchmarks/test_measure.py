"""What measures is measured: bytes of functions that are known, a judge that notices, a race that is fair."""

from dataclasses import replace

import pytest
import torch
from measure.gpu import Roofline
from measure.oracle import compute_truth, judge, relative_error
from measure.peak import slope
from measure.report import case_table, gpu_table
from measure.saved import saved_by, saved_bytes
from measure.timing import Spread, Times, over, race
from peers.baselines import dense, plain
from peers.contestant import Case, UnavailableError, make_problem
from peers.hf import transformers
from torch.nn import functional as F

CASE = Case("tiny", tokens=32, dim=16, hidden_dim=8, num_experts=4, top_k=2)


@pytest.fixture
def problem():
    return make_problem(CASE, torch.float32, "cpu", seed=0)


def judged(contestant, truth):
    return judge(contestant, contestant.step(), truth)


def test_the_oracle_agrees_with_a_mixture_over_all_experts(problem):
    truth = compute_truth(problem)
    x, router = problem.x.double(), problem.router_weight.double()
    weights, ids = (x @ router.mT).topk(2)
    weights = torch.zeros(32, 4, dtype=torch.float64).scatter(1, ids, weights.softmax(-1))
    gate, value = torch.einsum("td,eud->teu", x, problem.up_weight.double()).chunk(2, dim=-1)
    each = torch.einsum("tef,edf->ted", F.silu(gate) * value, problem.down_weight.double())
    torch.testing.assert_close(truth.y, torch.einsum("te,ted->td", weights, each))
    assert truth.tokens_per_expert.tolist() == torch.bincount(ids.flatten(), minlength=4).tolist()


def test_the_oracle_catches_a_wrong_output(problem):
    truth, right, wrong = compute_truth(problem), plain(problem), plain(problem)
    run = wrong.run
    wrong.run = lambda x: run(x) * 1.01
    assert judged(right, truth).output < 1e-6
    assert judged(wrong, truth).output == pytest.approx(0.01, rel=1e-3)


def test_the_oracle_catches_a_wrong_gradient_and_names_it(problem):
    truth, wrong = compute_truth(problem), plain(problem)
    gradients = wrong.gradients
    wrong.gradients = lambda: gradients() | {"down": gradients()["down"] * 1.5}
    found = judged(wrong, truth)
    assert (found.output < 1e-6, found.gradient_name) == (True, "down")
    assert found.gradient == pytest.approx(0.5)


def test_the_oracle_counts_tokens_that_went_elsewhere(problem):
    truth, moved = compute_truth(problem), plain(problem)
    route = moved.route

    def elsewhere(x):
        ids = route(x).flip(1)  # another order is the same decision
        ids[:3] = (ids[:3] + 1) % 4
        return ids

    moved.route = elsewhere
    shifted = ((truth.expert_ids[:3] + 1) % 4).sort(-1).values
    expected = int((shifted != truth.expert_ids[:3]).any(-1).sum())
    assert expected > 0
    assert judged(moved, truth).moved_tokens == expected


def test_gradients_of_another_shape_are_no_small_error():
    with pytest.raises(ValueError, match=r"shape \(4, 1\)"):
        relative_error(torch.ones(4, 1), torch.ones(4, 4, dtype=torch.float64))


def test_saved_bytes_of_known_functions():
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    given = [x, w]
    assert saved_bytes(lambda: x @ w, given) == 0  # it keeps what was given
    assert saved_bytes(lambda: (x @ w).exp(), given) == 8 * 16 * 4  # its result
    assert saved_bytes(lambda: (x @ w).exp().sin(), given) == 8 * 16 * 4  # the same tensor for both
    assert saved_bytes(lambda: (x @ w)[:, :4].cos(), given) == 8 * 16 * 4  # a view keeps all of its storage
    assert saved_bytes(lambda: (x @ w).exp().exp(), given) == 2 * 8 * 16 * 4
    with torch.no_grad():
        assert saved_bytes(lambda: (x @ w).exp(), given) == 0


def test_saved_bytes_of_the_floor(problem):
    width = CASE.top_k * CASE.hidden_dim
    assert saved_by(dense(problem)) == 32 * (2 * width + width + width) * 4


class Recorder:
    """A contestant and a clock in one: notes who was called and takes as many seconds as it is told."""

    def __init__(self, name, calls):
        self.name, self.calls, self.mode = name, calls, None

    def ready(self, training):
        self.mode = training

    def step(self):
        assert self.mode
        self.calls.append(self.name)

    def forward(self):
        assert not self.mode
        assert not torch.is_grad_enabled()


class Counter:
    def __init__(self):
        self.time = 0.0

    def seconds(self, work):
        work()
        self.time += 1.0
        return self.time


def test_contestants_take_turns_and_everyone_begins_once():
    calls = []
    times = race({name: Recorder(name, calls) for name in "abc"}, Counter(), rounds=3, warmup=1)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 12, 3)]
    assert rounds[1:] == ["abc", "bca", "cab"]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert times["a"] == Times(step=[7.0, 17.0, 21.0], forward=[8.0, 18.0, 22.0])  # the first six calls were warm-up


def test_a_ratio_is_that_of_its_round():
    # The machine is twice as slow in the second round: medians apart would say 1.5.
    assert over([3.0, 6.0, 3.0], [2.0, 4.0, 2.0]) == Spread(1.5, 1.5, 1.5)
    assert over([1.0, 8.0, 3.0], [1.0, 4.0, 1.0]).median == 2.0


def test_the_table_is_sorted_by_time_and_says_who_is_missing():
    times = {"plain": Times([2.0], [1.0]), "dense": Times([1.0], [0.5]), "ours": Times([1.5], [0.5])}
    none = dict.fromkeys(times)
    load = torch.tensor([40, 24, 0, 0])
    lines = list(case_table(CASE, load, times, none, none, {"torchtitan": "it is not here"}))
    assert [line.split()[1] for line in lines if line.startswith("| ")] == ["contestant", "dense", "ours", "plain"]
    assert "| ours | 1500 | 1.50 (1.50-1.50) | 500 | 1.00 (1.00-1.00) | - | - | - | - |" in lines
    assert "2.50 times the mean load, 2 of 4 have no token" in lines[2]
    assert lines[-1] == "- torchtitan is left out: it is not here"


def test_the_table_of_a_gpu_gives_flops_and_the_share_of_the_roofline():
    times = {"ours": Times([2e-6], [1e-6])}
    roofline = Roofline(flops=CASE.flops / 1e-6, bandwidth=1e30)  # a step could take a microsecond
    (line,) = [line for line in gpu_table(CASE, times, {"ours": 5_000_000}, roofline, torch.bfloat16) if "ours" in line]
    step, step_share, forward, forward_share, peak = (cell.strip() for cell in line.split("|")[2:-1])
    assert float(step) == pytest.approx(CASE.flops / 2e-6 / 1e12, rel=1e-3)
    assert float(forward) == pytest.approx(CASE.forward_flops / 1e-6 / 1e12, rel=1e-3)
    assert (step_share, forward_share, peak) == ("50%", "33%", "5")


def test_a_skew_makes_hot_experts_and_no_bias_in_anybodys_code():
    even, skewed = (
        compute_truth(make_problem(replace(CASE, tokens=512, skew=skew), torch.float32, "cpu", seed=0))
        for skew in (0.0, 2.0)
    )
    assert skewed.tokens_per_expert.max() > 1.3 * even.tokens_per_expert.max()


def test_flops_are_those_of_the_six_products():
    assert CASE.forward_flops == 2 * 64 * 16 * 16 + 2 * 64 * 8 * 16
    assert CASE.flops == 3 * CASE.forward_flops


def test_the_roofline_is_the_larger_of_two_times():
    weights, tokens = 3 * 4 * 16 * 8, 32 * 16
    assert Roofline(1.0, 1e30).seconds(CASE, 2, training=True) == CASE.flops
    assert Roofline(1e30, 1.0).seconds(CASE, 2, training=True) == 2 * (3 * weights + 5 * tokens)
    assert Roofline(1e30, 1.0).seconds(CASE, 2, training=False) == 2 * (weights + 2 * tokens)


def test_what_does_not_fit_in_memory_is_not_tried():
    huge = replace(make_problem(CASE, torch.float32, "cpu", 0), case=replace(CASE, tokens=2**40))
    with pytest.raises(UnavailableError, match=r"copies an expert's weights for every row: \d+ GiB"):
        transformers(huge, "batched_mm")


def test_the_slope_of_a_line():
    assert slope([1, 2, 4], [13.0, 16.0, 22.0]) == pytest.approx(3.0)
