"""Bins of margins: eight an octave on either side of zero, named by the leading bits of a float32."""

import torch
from torch import Tensor

from moe.errors import ConfigError, DtypeError, ShapeError

BINS_PER_OCTAVE = 8  # the three leading bits behind the point
SHIFT = 20  # what is left of a float32 without its other 20 bits counts octaves and their eighths
SMALLEST, LARGEST = -20, 4  # exponents: smaller margins share the bin next to zero, larger ones the outermost
FIRST = (127 + SMALLEST) * BINS_PER_OCTAVE - 1  # what is left of the last number below 2^SMALLEST
SIDE = (LARGEST - SMALLEST) * BINS_PER_OCTAVE + 1  # bins of one sign
BINS = 2 * SIDE
"""How many bins there are."""


def bin_of(margins: Tensor) -> Tensor:
    """The bin of each margin: of two margins the larger one's is never smaller, and 0 opens the bin ``BINS / 2``.

    Args:
        margins: any shape, floating point; read as float32. NaN has no bin of its own: it gets one of the outermost.

    Returns:
        int32 of the same shape, in 0 .. BINS - 1.
    """
    values = margins.float() + 0.0  # makes 0 of -0
    return write_bins(values, torch.empty_like(values, dtype=torch.int32)).add_(SIDE)


def write_bins(values: Tensor, out: Tensor) -> Tensor:
    """Write ``bin_of(values) - SIDE`` and overwrite ``values``: no memory is asked for, which costs more than the sums.

    Args:
        values: float32, none of them -0.
        out: int32 of the same shape; returned.
    """
    bits = values.view(torch.int32)
    torch.bitwise_right_shift(bits, 31, out=out)
    size = bits.bitwise_and_(0x7FFFFFFF).bitwise_right_shift_(SHIFT).sub_(FIRST).clamp_(0, SIDE - 1)
    return out.bitwise_xor_(size)  # below 0 with -1, all ones: size becomes -1 - size, the mirrored bin


def bin_edges(device: torch.device | str | None = None) -> Tensor:
    """Where each bin begins and the last one ends, ascending and symmetric about 0.

    A bin above 0 holds its lower edge, one below 0 its upper one. The outermost bins hold all beyond their edges too.

    Args:
        device: of the result; by default PyTorch's.

    Returns:
        ``(BINS + 1,)`` float32.
    """
    steps = torch.arange(-SIDE, SIDE + 1, dtype=torch.int32, device=device)
    return ((steps.abs() + FIRST) << SHIFT).view(torch.float32) * steps.sign()


def quantile(counts: Tensor, share: float | Tensor) -> Tensor:
    """The margin below which a share of an expert's margins lie, linear within its bin; waits for no device.

    Args:
        counts: ``(..., BINS)``, an integer dtype: sums of what ``count_margins`` returns.
        share: 0 .. 1, a number or a tensor that fits ``(...)``, on the device of ``counts``.

    Returns:
        ``(...)`` float32: to within its bin the smallest margin that the share reaches; 0 where nothing was counted.

    Raises:
        ShapeError: ``counts`` has another number of bins.
        DtypeError: ``counts`` is not of integers.
        ConfigError: ``share`` is a number outside 0 .. 1.
    """
    if counts.ndim == 0 or counts.shape[-1] != BINS:
        raise ShapeError(f"counts has shape {tuple(counts.shape)}, must be (..., {BINS})")
    if counts.dtype.is_floating_point or counts.dtype in (torch.bool, torch.complex64):
        raise DtypeError(f"counts has dtype {counts.dtype}, must be an integer one")
    if not isinstance(share, Tensor) and not 0 <= share <= 1:
        raise ConfigError(f"share={share} must be between 0 and 1")
    reached = counts.cumsum(-1)
    total = reached[..., -1]
    target = total.double() * share
    # The first bin that reaches the target; for a target of 0 the first that has counted anything.
    found = ((reached < target[..., None]) | (reached == 0)).sum(-1, keepdim=True).clamp_(max=BINS - 1)
    inside = counts.gather(-1, found)
    edges = bin_edges(counts.device).double()
    part = (target[..., None] - (reached.gather(-1, found) - inside)) / inside.clamp(min=1)
    value = torch.lerp(edges[found], edges[found + 1], part).squeeze(-1)
    return value.masked_fill(total == 0, 0).float()
