"""Pairs of experts, and experts against classes of tokens, against plain loops; the bias against simulation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.errors import ConfigError, ShapeError
from moe.monitor import Specialization, co_activation, co_activation_probability, specialization

EXPERTS, CLASSES = 5, 3
ROWS = st.lists(st.permutations(range(-1, EXPERTS)).map(lambda order: order[:3]), min_size=1, max_size=15)
"""Three different experts or none a token; -1 in any slot."""


def ids_of(rows):
    return torch.tensor(rows, dtype=torch.int32)


@given(ROWS)
def test_pairs_are_counted_as_a_loop_does(rows):
    expected = [[0] * EXPERTS for _ in range(EXPERTS)]
    for row in rows:
        for i in set(row) - {-1}:
            for j in set(row) - {-1}:
                expected[i][j] += 1
    found = co_activation(ids_of(rows), EXPERTS)
    assert found.tolist() == expected
    assert found.dtype == torch.int64
    shares = co_activation_probability(found)
    for i, row in enumerate(expected):
        assert shares[i].tolist() == pytest.approx([count / max(row[i], 1) for count in row])


def test_a_conditional_probability_is_not_symmetric():
    """Expert 1 never comes without expert 0, which usually comes without it."""
    shares = co_activation_probability(co_activation(ids_of([[0, 1], [0, 2], [0, 2], [2, 0]]), 4))
    assert (shares[1, 0], shares[0, 1]) == (1, 0.25)
    assert shares[3].tolist() == [0, 0, 0, 0]


def test_experts_that_know_nothing_of_each_other():
    """20,000 tokens, K=3 of E=6: (K - 1) / (E - 1) = 0.4, each share of 10,000 tokens to 0.005."""
    shares = co_activation_probability(co_activation(torch.rand(20_000, 6).topk(3).indices.int(), 6))
    assert torch.allclose(shares[~torch.eye(6, dtype=torch.bool)], torch.tensor(0.4), atol=0.025)


def information_by_loops(counts):
    total = sum(map(sum, counts))
    experts, classes = [sum(row) for row in counts], [sum(column) for column in zip(*counts)]
    return sum(
        n / total * math.log2(n * total / (experts[e] * classes[c]))
        for e, row in enumerate(counts)
        for c, n in enumerate(row)
        if n
    )


@given(ROWS, st.data())
def test_classes_are_counted_as_a_loop_does(rows, data):
    classes = data.draw(st.lists(st.integers(-1, CLASSES - 1), min_size=len(rows), max_size=len(rows)))
    expected = [[0] * CLASSES for _ in range(EXPERTS)]
    for row, kind in zip(rows, classes):
        for expert in row:
            if expert >= 0 and kind >= 0:
                expected[expert][kind] += 1
    found = specialization(ids_of(rows), torch.tensor(classes), EXPERTS, CLASSES)
    assert found.counts.tolist() == expected
    assert found.counts.dtype == torch.int64
    assert found.mutual_information.item() == pytest.approx(information_by_loops(expected), abs=1e-12)
    for row, shares in zip(expected, found.class_shares.tolist()):
        assert shares == pytest.approx([count / max(sum(row), 1) for count in row])


@given(ROWS, st.permutations(range(EXPERTS)), st.data())
def test_the_names_of_experts_do_not_matter(rows, order, data):
    kinds = data.draw(st.lists(st.integers(0, CLASSES - 1), min_size=len(rows), max_size=len(rows)))
    renamed = [[order[e] if e >= 0 else -1 for e in row] for row in rows]
    first, second = (specialization(ids_of(r), torch.tensor(kinds), EXPERTS, CLASSES) for r in (rows, renamed))
    assert first.counts[torch.tensor(order).argsort()].tolist() == second.counts.tolist()
    assert second.mutual_information.item() == pytest.approx(first.mutual_information.item(), abs=1e-12)
    assert second.mutual_information_bias == first.mutual_information_bias


def test_information_at_its_extremes():
    own = Specialization(torch.diag(torch.tensor([5, 5, 5, 5])))
    assert own.mutual_information.item() == pytest.approx(2)
    assert own.class_entropy.item() == pytest.approx(2)
    alike = Specialization(torch.tensor([[2, 6], [1, 3]]))
    assert alike.mutual_information.item() == pytest.approx(0, abs=1e-12)
    assert alike.class_entropy.item() == pytest.approx(-0.25 * math.log2(0.25) - 0.75 * math.log2(0.75))
    nothing = Specialization(torch.zeros(3, 2, dtype=torch.int64))
    assert nothing.mutual_information == nothing.mutual_information_bias == nothing.class_entropy == 0


def mean_information(top_k, trials=300, tokens=600):
    """Bits that experts show about classes of which they know nothing, 6 experts that are used and 4 classes."""
    found = []
    for _ in range(trials):
        ids, classes = torch.rand(tokens, 6).topk(top_k).indices.int(), torch.randint(4, (tokens,))
        found.append(specialization(ids, classes, 8, 5))  # two experts and one class never occur
    return (
        sum(each.mutual_information.item() for each in found) / trials,
        found[0].mutual_information_bias.item(),
    )


def test_chance_shows_about_the_bias():
    """2 N ln 2 times the information is near chi-squared with 15 degrees of freedom: sqrt(2 / 15 / 300) = 2 %."""
    mean, bias = mean_information(top_k=1)
    assert bias == pytest.approx(5 * 3 / (2 * 600 * math.log(2)))
    assert mean == pytest.approx(bias, rel=0.08)


def test_distinct_experts_show_less_by_chance():
    mean, bias = mean_information(top_k=3)
    assert mean == pytest.approx(bias * (6 - 3) / (6 - 1), rel=0.08)


def test_what_does_not_fit_is_said(unchecked):
    ids = ids_of([[0, 3]])
    with pytest.raises(ConfigError, match="expert_ids from 0 to 3 must be from -1 to 2, since num_experts=3"):
        co_activation(ids, 3)
    with pytest.raises(ConfigError, match="classes from 2 to 2 must be from -1 to 1, since num_classes=2"):
        specialization(ids, torch.tensor([2]), 4, 2)
    with pytest.raises(ConfigError, match="expert_ids from -2 to 0"):
        specialization(ids_of([[0, -2]]), torch.tensor([1]), 4, 2)
    with pytest.raises(ShapeError, match="classes has 2 tokens, but expert_ids has 1"):
        specialization(ids, torch.tensor([0, 1]), 4, 2)


def test_no_tokens_are_allowed():
    nothing = torch.empty(0, 2, dtype=torch.int32)
    assert co_activation(nothing, 3).tolist() == [[0] * 3] * 3
    assert specialization(nothing, torch.empty(0, dtype=torch.int64), 3, 2).counts.tolist() == [[0, 0]] * 3
