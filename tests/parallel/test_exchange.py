"""The exchange itself: backward over a kept graph, refused second gradients, and what overlaps what."""

import pytest
import torch

from moe.parallel.local_ranks import run_local
from tests.support.exchanges import checkpointed, exchange_twice, order_of_calls, shared_tokens


def test_backward_may_run_twice_and_no_gradient_of_a_gradient_is_made_up() -> None:
    (y0, *of_0), (y1, *of_1) = run_local(exchange_twice, 2, timeout=60)
    assert y0.flatten().tolist() == [0, 10, 11, 12]
    assert y1.flatten().tolist() == [1, 2]
    first_0, second_0, said = of_0
    assert first_0.flatten().tolist() == [0, 2 * 2 * 1, 2 * 2 * 2]  # the loss of rank 1 counts twice
    assert torch.equal(first_0, second_0)
    assert torch.equal(of_1[0], of_1[1])
    assert of_1[0].flatten().tolist() == [20, 22, 24]
    assert said == of_1[2]
    assert "once_differentiable" in said


def test_a_round_is_on_its_way_before_the_one_before_it_is_computed() -> None:
    whole, halves, limited = (run_local(order_of_calls, 2, args, timeout=60) for args in ((1, None), (2, None), (1, 2)))
    one = ["go", "arrived", "experts", "return"]
    assert whole == [[*one, "returned"]] * 2
    assert (
        halves == [["go", "go", "arrived", "experts", "return", "arrived", "experts", "return", *["returned"] * 2]] * 2
    )
    assert limited[0][: 2 * len(one) + 2] == [*one, "returned"] * 2  # one in memory at a time


@pytest.mark.parametrize("mode", ["kept", "reentrant", "not reentrant"])
@pytest.mark.parametrize("options", [{}, {"max_received_tokens": 3}, {"chunks": 2}], ids=str)
def test_recomputed_layers(mode: str, options: dict[str, int]) -> None:
    found = run_local(checkpointed, 2, (mode, (7, 4), options), timeout=60)[0]
    assert len(found) == 10
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize("mode", ["kept", "reentrant", "not reentrant"])
def test_a_rank_without_tokens_in_any_layer(mode: str) -> None:
    found = run_local(checkpointed, 2, (mode, (7, 0), {"max_received_tokens": 3}), timeout=60)[0]
    assert len(found) == 10
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize("rows", [6, 7, 1])
def test_tokens_that_both_ranks_have(rows: int) -> None:
    for errors in run_local(shared_tokens, 2, (rows,), timeout=60):
        assert all(error <= 1e-12 * size for error, size in errors)
