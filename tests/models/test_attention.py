"""Grouped-query attention against softmax written out, and the masks it is given."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe.models.attention import Attention, attention_mask
from moe.models.rotary import rotary_tables


def explicit(attention: Attention, x: torch.Tensor, heads: int, kv_heads: int, allowed: torch.Tensor) -> torch.Tensor:
    """Attention head by head: complex numbers for the rotation, one softmax a head, keys repeated by index."""
    S, D = x.shape[1:]
    width = D // heads
    frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=x.dtype) * 2 / width)
    angles = torch.arange(S, dtype=x.dtype)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)

    def head(row: int, turned: bool) -> torch.Tensor:
        y = x @ attention.qkv.weight[row * width : (row + 1) * width].T
        if not turned:
            return y
        z = torch.complex(y[..., : width // 2], y[..., width // 2 :]) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    mixed = []
    for h in range(heads):
        group = h // (heads // kv_heads)
        q, k, v = head(h, True), head(heads + group, True), head(heads + kv_heads + group, False)
        scores = (q @ k.transpose(1, 2) / math.sqrt(width)).masked_fill(~allowed, -math.inf)
        mixed.append(scores.softmax(-1) @ v)
    return torch.cat(mixed, dim=-1) @ attention.out.weight.T


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (1, 1)])
def test_it_is_softmax_attention_with_shared_keys(small_config, heads, kv_heads, padded):
    attention = Attention(small_config(dim=24, num_heads=heads, num_kv_heads=kv_heads)).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    token_mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1]]).bool() if padded else None
    real = torch.ones(2, 7).bool() if token_mask is None else token_mask
    earlier = torch.arange(7)[:, None] >= torch.arange(7)
    allowed = earlier & (real[:, None, :] | torch.eye(7).bool())

    y = attention(
        x, *rotary_tables(torch.arange(7), 24 // heads, 10000.0, x.dtype), attention_mask(7, 0, token_mask, x.device)
    )
    expected = explicit(attention, x, heads, kv_heads, allowed)
    # Sums of 24 float64 products, two deep.
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    parameters = (x, attention.qkv.weight, attention.out.weight)
    seed = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, parameters, seed), torch.autograd.grad(expected, parameters, seed)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


class Ops(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("token_mask", [None, torch.ones(2, 7).bool()])
def test_the_fused_kernel_runs(small_config, kv_heads, token_mask):
    attention = Attention(small_config(num_kv_heads=kv_heads))
    tables = rotary_tables(torch.arange(7), 6, 10000.0, torch.float32)
    with Ops() as ops:
        attention(torch.randn(2, 7, 24), *tables, attention_mask(7, 0, token_mask, torch.device("cpu")))
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in ops.names


def test_no_mask_is_made_where_the_kernel_needs_none():
    cpu = torch.device("cpu")
    assert attention_mask(7, 0, None, cpu) is None
    assert attention_mask(1, 9, None, cpu) is None


def test_new_tokens_see_all_past_ones_and_the_new_ones_before():
    mask = attention_mask(3, 2, None, torch.device("cpu"))
    assert mask is not None
    assert mask.int().tolist() == [[[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]


def test_padding_is_seen_by_itself_only():
    mask = attention_mask(3, 0, torch.tensor([[False, True, True], [True, False, True]]), torch.device("cpu"))
    assert mask is not None
    assert mask.int().tolist() == [[[[1, 0, 0], [0, 1, 0], [0, 1, 1]]], [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]]
