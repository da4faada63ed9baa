"""Hash routing: the table's balance, decisions by id alone, and ids that are missing or wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import ConfigError, DtypeError, ShapeError
from moe.routing import HashRouter, balanced_table
from tests.routing.zoo import VOCABULARY, build


@given(st.integers(1, 300), st.integers(1, 16), st.integers(0, 5), st.data())
@settings(max_examples=80)
def test_experts_of_an_id_are_distinct_and_own_equally_many_places_up_to_one(vocab_size, num_experts, seed, data):
    top_k = data.draw(st.integers(1, num_experts))
    table = balanced_table(vocab_size, num_experts, top_k, seed)
    assert table.shape == (vocab_size, top_k)
    assert all(len(set(row)) == top_k for row in table.tolist())
    places = torch.bincount(table.flatten(), minlength=num_experts)
    assert places.max() - places.min() <= 1
    assert torch.equal(table, balanced_table(vocab_size, num_experts, top_k, seed))


def test_another_seed_is_another_table_and_rows_are_not_neighbours():
    table = balanced_table(1000, 16, 2, 0)
    assert (table != balanced_table(1000, 16, 2, 1)).float().mean() > 0.8
    # Of random pairs of 16 experts 2/15 are neighbours on the ring; a table of consecutive ids would have them all.
    assert (((table[:, 1] - table[:, 0]) % 16) % 14 == 1).float().mean() < 0.3


def test_an_id_has_the_same_experts_wherever_it_stands():
    router = build("hash")
    ids = torch.randint(0, VOCABULARY, (200,))
    routing = router(torch.randn(200, 16), token_ids=ids)
    assert torch.equal(routing.expert_ids, router.table[ids])
    chosen = routing.scores.gather(1, routing.expert_ids.long())
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))


def test_weights_that_are_not_learnt_are_even():
    router = build("hash", learnt_weights=False, scale=3.0)
    routing = router(torch.randn(4, 16), torch.tensor([True, True, False, True]), token_ids=torch.arange(4))
    assert routing.weights.tolist() == [[1.5, 1.5], [1.5, 1.5], [0.0, 0.0], [1.5, 1.5]]
    assert not routing.weights.requires_grad


def test_the_table_stays_whole_numbers_and_is_stored():
    router = build("hash").bfloat16()
    assert router.table.dtype == torch.int32
    other = build("hash")
    other.table.zero_()
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.table, router.table)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (None, ConfigError, "token_ids=None: the router 'hash'"),
        ([0, 1], ShapeError, r"token_ids has shape \(2,\)"),
        ([0, 1, VOCABULARY], ConfigError, f"token_ids are 0 to {VOCABULARY}, must be between 0 and vocab_size - 1, "),
        ([0, -1, 1], ConfigError, "token_ids are -1 to 1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_ids_that_are_missing_or_outside_are_named(ids, error, message):
    with pytest.raises(error, match=message):
        build("hash")(torch.randn(3, 16), token_ids=None if ids is None else torch.tensor(ids))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_ids_of_any_width_are_looked_up(dtype):
    ids, x, mask = torch.arange(9), torch.randn(9, 16), torch.arange(9) % 3 > 0
    found = build("hash")(x, mask, token_ids=ids.to(dtype)).expert_ids
    assert torch.equal(found, build("hash")(x, mask, token_ids=ids).expert_ids)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.usefixtures("unchecked")
def test_ids_that_are_no_whole_numbers_are_named(dtype):
    with pytest.raises(DtypeError, match=f"token_ids is {dtype}; ids must be integers"):
        build("hash")(torch.randn(3, 16), token_ids=torch.ones(3, dtype=dtype))


def test_padding_may_have_any_id():
    routing = build("hash")(torch.randn(3, 16), torch.tensor([True, False, True]), token_ids=torch.tensor([5, -100, 6]))
    assert routing.expert_ids[1].tolist() == [-1, -1]


def test_a_vocabulary_of_nothing_is_named():
    with pytest.raises(ConfigError, match="vocab_size=0 must be positive"):
        HashRouter(16, 8, 2, vocab_size=0)
