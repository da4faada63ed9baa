"""Losses on the router's weight, against loops over pairs of rows."""

import pytest
import torch

from moe.balance import RouterOrthogonality, RouterSimilarity
from moe.errors import ConfigError
from tests.balance.decisions import gradient


def loops(weight, entry, normalise):
    rows = [row / row.norm() if normalise else row for row in weight]
    return sum(entry(u @ v - float(i == j)) for i, u in enumerate(rows) for j, v in enumerate(rows))


CASES = [(RouterOrthogonality(), torch.square, True), (RouterSimilarity(), torch.abs, False)]


@pytest.mark.parametrize(("loss", "entry", "normalise"), CASES)
@pytest.mark.parametrize(("num_experts", "dim"), [(5, 7), (7, 3), (1, 4)])
def test_against_loops(loss, entry, normalise, num_experts, dim):
    weight = torch.randn(num_experts, dim, dtype=torch.float64, requires_grad=True)
    value, expected = loss.of_weight(weight), loops(weight, entry, normalise)
    torch.testing.assert_close(value, expected)
    # One normalised row has no gradient but for rounding.
    torch.testing.assert_close(gradient(value, weight), gradient(expected, weight), atol=1e-14, rtol=1e-7)


def test_orthogonal_rows_have_no_loss():
    rows = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][:5]
    assert RouterOrthogonality().of_weight(3 * rows).item() < 1e-28
    assert RouterSimilarity().of_weight(rows).item() < 1e-13
    # The lengths: 5 rows of squared length 9.
    assert RouterSimilarity().of_weight(3 * rows).item() == pytest.approx(5 * 8)


def test_more_experts_than_directions_have_a_floor():
    """Welch's bound, E^2 / D - E, reached by three directions of a plane at 120 degrees."""
    angles = torch.arange(3, dtype=torch.float64) * 2 * torch.pi / 3
    rows = torch.stack([angles.cos(), angles.sin()], -1)
    assert RouterOrthogonality().of_weight(rows).item() == pytest.approx(9 / 2 - 3)


@pytest.mark.parametrize("loss", [RouterOrthogonality(), RouterSimilarity()], ids=lambda loss: type(loss).__name__)
def test_an_expert_without_a_direction_has_finite_gradients(loss):
    weight = torch.zeros(3, 4, requires_grad=True)
    value = loss.of_weight(weight)
    assert value.item() == 3
    assert gradient(value, weight).isfinite().all()


@pytest.mark.parametrize("loss", [RouterOrthogonality(), RouterSimilarity()], ids=lambda loss: type(loss).__name__)
def test_bfloat16_weights_and_autocast_are_computed_in_float32(loss):
    weight = torch.randn(6, 9).bfloat16()
    expected = loss.of_weight(weight.double())
    assert loss.of_weight(weight).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kind in (weight, weight.float()):
            value = loss.of_weight(kind)
            assert value.dtype == torch.float32
            # 36 entries, each a sum of 9 products: float32 is good to some 1e-6, bfloat16 to 1e-2.
            torch.testing.assert_close(value, expected.float(), atol=0, rtol=1e-5)


@pytest.mark.parametrize("loss", [RouterOrthogonality, RouterSimilarity])
def test_coefficients_must_be_positive(loss):
    with pytest.raises(ConfigError, match="coefficient=-1 must be positive"):
        loss(-1)
