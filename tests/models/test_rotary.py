"""Rotary embedding against plane rotations written out, and the property it exists for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.models.rotary import rotary_tables, rotate

THETA = 100.0


def at(x: torch.Tensor, position: int) -> torch.Tensor:
    """One head's vector, turned to a position."""
    tables = rotary_tables(torch.tensor([position]), x.shape[-1], THETA, x.dtype)
    return rotate(x.view(1, 1, 1, -1), *tables).view(-1)


def test_each_pair_turns_by_its_own_angle():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    turned = rotate(x, *rotary_tables(torch.arange(7, 12), 8, THETA, x.dtype))
    for s in range(5):
        for i in range(4):
            angle = (7 + s) * THETA ** (-2 * i / 8)
            a, b = x[:, s, :, i], x[:, s, :, i + 4]
            # A float64 product and sum: a few units of 1e-16.
            torch.testing.assert_close(turned[:, s, :, i], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(turned[:, s, :, i + 4], a * math.sin(angle) + b * math.cos(angle))


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.sampled_from([2, 6, 16]))
def test_scores_depend_on_the_distance_only(first, second, shift, head_dim):
    draw = torch.Generator().manual_seed(first)
    q, k = torch.randn(2, head_dim, dtype=torch.float64, generator=draw)
    # Angles up to 1000 rad are exact to 1e-13, and a score is a sum of 16 products.
    torch.testing.assert_close(
        at(q, first + shift) @ at(k, second + shift), at(q, first) @ at(k, second), rtol=0, atol=1e-10
    )


def test_a_turn_keeps_lengths_and_position_zero_is_no_turn():
    x = torch.randn(8, dtype=torch.float64)
    assert torch.equal(at(x, 0), x)
    torch.testing.assert_close(at(x, 123).norm(), x.norm())
    assert not torch.allclose(at(x, 123), x)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_angles_are_float32_at_least(dtype, expected):
    cos, sin = rotary_tables(torch.tensor([255, 256, 257]), 8, 10000.0, dtype)
    assert cos.dtype == sin.dtype == expected
    assert cos[:, 0, 0].unique().numel() == 3  # bfloat16 positions would make 256 and 257 equal


def test_bfloat16_is_rounded_once():
    x = torch.randn(1, 9, 2, 16).bfloat16()
    tables = rotary_tables(torch.arange(9), 16, THETA, x.dtype)
    turned = rotate(x, *tables)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), *tables).bfloat16())
