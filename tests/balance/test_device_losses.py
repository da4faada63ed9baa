"""Losses over devices, against loops over tokens and devices."""

import pytest
import torch

import moe
from moe.balance import CommunicationBalance, DeviceBalance, SwitchLoss, make_balance
from moe.errors import ConfigError
from moe.types import Routing
from tests.balance.decisions import by_sequence, decision, gradient

MASKS = {
    "all": None,
    "padded": torch.arange(24) % 8 < torch.tensor([8, 5, 0]).repeat_interleave(8),
    "none": torch.zeros(24, dtype=torch.bool),
}
SCOPES = [(1, "call"), (3, "sequence")]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("num_sequences", "scope"), SCOPES)
@pytest.mark.parametrize("num_devices", [1, 2, 3, 6])
def test_device_balance_against_the_papers_formula(mask, num_sequences, scope, num_devices):
    routing, logits = decision(24, 6, 2, num_sequences, mask, sigmoid=True)
    loss = DeviceBalance(scope=scope, num_devices=num_devices)(routing)
    size, parts = 6 // num_devices, by_sequence(routing)
    total, expected = max(sum(n for _, _, n, _ in parts), 1), 0.0 * logits.sum()
    for load, probability, n, _ in parts:
        for first in range(0, 6, size):
            mean_f = sum(6 * f for f in load[first : first + size]) / size  # the paper's f is E times the share
            expected = expected + n / total * mean_f * sum(probability[first : first + size])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("num_sequences", "scope"), SCOPES)
@pytest.mark.parametrize(("num_devices", "top_devices"), [(1, 1), (2, 1), (3, 2), (6, 3)])
def test_communication_balance_against_the_papers_formula(mask, num_sequences, scope, num_devices, top_devices):
    routing, logits = decision(24, 6, 3, num_sequences, mask)
    loss = CommunicationBalance(scope=scope, num_devices=num_devices, top_devices=top_devices)(routing)
    size, parts = 6 // num_devices, by_sequence(routing)
    total, expected = max(sum(n for _, _, n, _ in parts), 1), 0.0 * logits.sum()
    for _, probability, n, chosen in parts:
        for d in range(num_devices):
            sent = sum(d in {e // size for e in experts} for experts in chosen)
            f = num_devices / (top_devices * max(n, 1)) * sent
            expected = expected + n / total * f * sum(probability[d * size : (d + 1) * size])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_values_at_balance_and_at_collapse():
    """4 experts on 2 devices; each token has both experts of a device."""
    scores = torch.full((4, 4), 0.25)
    even = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]], dtype=torch.int32)
    for ids, sure, device, sent in [
        (even, scores, 1.0, 1.0),
        (even.clamp(max=1), torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(4, 4), 2.0, 2.0),
    ]:
        routing = Routing(ids, torch.full((4, 2), 0.5), sure, sure)
        assert DeviceBalance(num_devices=2)(routing).item() == device
        assert CommunicationBalance(num_devices=2, top_devices=1)(routing).item() == sent


def test_experts_may_be_uneven_within_a_device():
    scores = torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    routing = Routing(torch.tensor([[0, 2]], dtype=torch.int32), torch.full((1, 2), 0.5), scores, scores)
    assert SwitchLoss()(routing).item() == 2
    assert DeviceBalance(num_devices=2)(routing).item() == 1


def test_a_device_is_sent_a_token_once_however_many_of_its_experts_it_has():
    """Of three assignments two are on device 0, so the load is uneven; what is sent is not."""
    scores = torch.full((1, 4), 0.25)
    routing = Routing(torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.ones(1, 3), scores, scores)
    assert CommunicationBalance(num_devices=2, top_devices=2)(routing).item() == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeviceBalance(num_devices=0), "num_devices=0 must be positive"),
        (lambda: DeviceBalance(-0.1, num_devices=2), "coefficient=-0.1 must be positive"),
        (lambda: DeviceBalance(num_devices=2, scope="device"), "scope='device' is unknown"),
        (lambda: CommunicationBalance(num_devices=-2, top_devices=1), "num_devices=-2 must be positive"),
        (lambda: CommunicationBalance(num_devices=2, top_devices=3), "top_devices=3 must be .* num_devices=2"),
        (lambda: CommunicationBalance(num_devices=2, top_devices=0), "top_devices=0 must be positive"),
        (lambda: CommunicationBalance(-1, num_devices=2, top_devices=1), "coefficient=-1 must be positive"),
        (
            lambda: CommunicationBalance(num_devices=2, top_devices=1, scope="global"),
            "scope='global' must be one of call, sequence",
        ),
        (lambda: DeviceBalance(num_devices=3).check(8, 0, 2), "num_devices=3 must divide num_experts=8"),
        (
            lambda: CommunicationBalance(num_devices=3, top_devices=1).check(8, 0, 2),
            "num_devices=3 must divide num_experts=8",
        ),
        (lambda: DeviceBalance(num_devices=2).check(8, 2, 2), "num_devices=2 beside null experts"),
        (lambda: make_balance({"device_balance": {}}), "balance='device_balance' .*num_devices"),
        (lambda: moe.MoE(8, 8, 4, balance={"device_balance": {"num_devices": 3}}), "num_devices=3 must divide"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_sizes_that_fit_pass():
    DeviceBalance(num_devices=4).check(8, 0, 2)
    CommunicationBalance(num_devices=4, top_devices=2).check(8, 0, 2)


def test_without_a_check_the_loss_itself_says_what_does_not_fit():
    routing, _ = decision(num_experts=8)
    for loss in (DeviceBalance(num_devices=3), CommunicationBalance(num_devices=3, top_devices=1)):
        with pytest.raises(ConfigError, match="num_devices=3 must divide num_experts=8"):
            loss(routing)
