"""The tile that each GPU gets for its grouped products, and what its tensor memory accelerator can fetch.

A tile is a pure function of the GPU, the dtype and the widths, never of the number of rows: a row is then summed in the
same order whatever else is in its batch, and gets the same bits (batch invariance).
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from moe.kernels.triton_gpus import require_supported_gpu

TMA_ALIGNMENT = 16  # bytes, of the start and of every stride but the last


@dataclass(frozen=True)
class Tile:
    """How one program computes a block of a product.

    Attributes:
        rows: height of the block: rows of a product, or the features of the left operand of a weight's gradient.
        width: its width: the features of the output, or of the right operand.
        depth: elements of the summed dimension a step.
        warps: of a program.
        stages: steps in flight, counting the one that is computed.
        tma: operands that are not gathered are fetched by the tensor memory accelerator where they are aligned.
        per_sm: programs that one multiprocessor holds.
        strip: blocks of a weight's gradient that a program computes one after another, with the same descriptors.
    """

    rows: int
    width: int
    depth: int
    warps: int
    stages: int
    tma: bool = False
    per_sm: int = 1
    strip: int = 1


# By width, the widest first. The others are for layers that would leave most of a wide tile empty. 128 x 256 because
# a smaller one cannot feed the tensor cores of Hopper: shared memory then moves more bytes than it can.
_AMPERE = (Tile(128, 256, 32, 8, 4), Tile(128, 128, 32, 4, 4, per_sm=2), Tile(128, 64, 32, 4, 4, per_sm=3))
_HOPPER = (
    Tile(128, 256, 64, 8, 4, tma=True, strip=4),
    Tile(128, 128, 64, 8, 3, tma=True, per_sm=2, strip=4),
    Tile(128, 64, 64, 4, 3, tma=True, per_sm=3, strip=4),
)
_BLACKWELL = tuple(replace(tile, strip=1) for tile in _HOPPER)  # more in a row spill with float32 results
_CDNA = (Tile(128, 256, 32, 8, 2), Tile(128, 128, 32, 4, 2, per_sm=2), Tile(128, 64, 32, 4, 2, per_sm=2))
# Products of float32 are not for tensor cores but unrolled into the program, which a deep tile would bloat.
_FLOAT32 = (Tile(128, 128, 16, 8, 3), Tile(128, 64, 16, 4, 3, per_sm=2))
# For rows of half precision that do not start at multiples of 16 bytes: their elements pass through registers one by
# one, and a larger tile would spill hundreds of bytes a thread. AMD's GPUs have registers enough.
_UNALIGNED = (Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 8, 4, per_sm=2))
_UNALIGNED_BLACKWELL = tuple(replace(tile, rows=64) for tile in _UNALIGNED)


def tiles_of(family: str, dtype: torch.dtype, *, aligned: bool = True) -> tuple[Tile, ...]:
    """All tiles that a family of GPUs may get, the widest first.

    Args:
        family: see :func:`moe.kernels.triton_gpus.family_of`.
        dtype: of the operands.
        aligned: whether both widths are multiples of 16 bytes.
    """
    if dtype == torch.float32:
        return _FLOAT32
    if aligned or family == "cdna":
        return {"ampere": _AMPERE, "hopper": _HOPPER, "blackwell": _BLACKWELL, "cdna": _CDNA}[family]
    return _UNALIGNED_BLACKWELL if family == "blackwell" else _UNALIGNED


def operand_bytes(tile: Tile, dtype: torch.dtype) -> int:
    """Shared memory for a tile's operands, the bulk of what a program takes."""
    return (tile.rows + tile.width) * tile.depth * tile.stages * dtype.itemsize


def gpu_family() -> str:
    """The family of the current GPU, by what it can hold; does not synchronise.

    Raises:
        ConfigError: there are no kernels for this GPU.
    """
    family = require_supported_gpu()
    if family in ("hopper", "blackwell"):  # a part with less shared memory than a data centre's gets Ampere's tiles
        driver = triton.runtime.driver.active
        held = driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"]
        widest = tiles_of(family, torch.bfloat16)[0]
        family = family if operand_bytes(widest, torch.bfloat16) < held else "ampere"
    return family


def tile_for(dtype: torch.dtype, width: int, other_width: int) -> Tile:
    """The tile for a product on the current GPU: the narrowest that holds its width, or the widest.

    Args:
        dtype: of the operands.
        width: of the product, or of the right operand of a weight's gradient.
        other_width: of what is multiplied, or of the left operand.
    """
    tiles = tiles_of(gpu_family(), dtype, aligned=_aligned(dtype, width, other_width))
    return next((tile for tile in reversed(tiles) if tile.width >= width), tiles[0])


def _aligned(dtype: torch.dtype, *steps: int | torch.SymInt) -> bool:
    return all(step * dtype.itemsize % TMA_ALIGNMENT == 0 for step in steps)


def rows_fit_tma(rows: Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch blocks of contiguous ``(N, width)``: each row starts aligned.

    Not by its strides: PyTorch calls one row contiguous whatever its stride, and the kernels go by the width.
    """
    return _aligned(rows.dtype, rows.shape[1], rows.storage_offset())


def weight_fits_tma(weight: Tensor, depth: int) -> bool:
    """Whether one descriptor describes all experts' matrices as one, in which no block adds the next expert's.

    Args:
        weight: ``(E, O, I)``, any strides: the kernel goes by them.
        depth: of the tile.
    """
    between, across, along = weight.stride()
    if along == 1:
        step = across
    elif across == 1 and weight.shape[2] % depth == 0:  # a block past the end would add the next expert's products
        step = along
    else:
        return False
    return _aligned(weight.dtype, between, step, weight.storage_offset()) and between % step == 0
