"""Rotary position embedding: positions as rotations of pairs of channels."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_tables(
    positions: Int[Tensor, " S"], head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "S 1 head_dim"], Float[Tensor, "S 1 head_dim"]]:
    """Cosines and sines of the angle of every position and channel, for `rotate`.

    Computed where they are used, once a forward for all layers, and not kept as a buffer: a buffer would be rounded
    by ``model.to(torch.bfloat16)`` and left undefined by ``to_empty`` after building on the meta device.

    Args:
        positions: ``(S,)``, tokens from the start of the sequence.
        head_dim: width of a head, even.
        theta: base of the wavelengths.
        dtype: of the model; angles are float32 at least, since bfloat16 cannot tell position 256 from 257.

    Returns:
        ``(S, 1, head_dim)`` cosines and ``(S, 1, head_dim)`` sines; the sines' first half has its sign turned.

    Source: Su et al. 2021, arXiv:2104.09864, equation 15 (the rotation) and 34 (its cheap form).
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = positions.to(dtype)[:, None, None] * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(
    x: Float[Tensor, "B S H head_dim"], cos: Float[Tensor, "S 1 head_dim"], sin: Float[Tensor, "S 1 head_dim"]
) -> Float[Tensor, "B S H head_dim"]:
    """Turn channel i of each head together with channel i + head_dim / 2 (the half layout, as in Hugging Face's Llama).

    Args:
        x: ``(B, S, H, head_dim)`` queries or keys.
        cos: ``(S, 1, head_dim)`` from `rotary_tables`.
        sin: ``(S, 1, head_dim)`` from `rotary_tables`.

    Returns:
        Like ``x``; the arithmetic is in the tables' dtype.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cos + swapped * sin).to(x.dtype)
