"""Grouped products on GPUs: the launches. The kernels and their tiles are in the modules next to this one."""

from collections.abc import Callable
from contextvars import copy_context

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from moe.kernels.grouped_mm.triton_product import COLUMN_TILES, grouped_mm_kernel
from moe.kernels.grouped_mm.triton_tiles import rows_fit_tma, tile_for, weight_fits_tma
from moe.kernels.grouped_mm.triton_weight_grad import grouped_sum_kernel, weight_grad_kernel

SUM_BLOCK_ROWS = 32
SUM_BLOCK_DIM = 128


def _with_scratch(device: torch.device, launch: Callable[[], None]) -> None:
    """Launch kernels that keep descriptors in scratch memory, which Triton asks an allocator for.

    Triton's allocator is a context variable: set in a copy of the context, it is gone after the launch.
    """

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        launch()

    copy_context().run(run)


def grouped_mm(
    rows: Tensor, weight: Tensor, expert_offsets: Tensor, *, tokens: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Multiply each expert's rows by its matrix; see :func:`moe.kernels.grouped_mm.grouped_mm`.

    Args:
        rows: ``(N, I)``, contiguous; ``(T, I)`` with ``tokens``.
        weight: ``(E, O, I)``, any strides.
        expert_offsets: ``(E + 1,)`` int32.
        tokens: ``(N,)`` int32; row i of the product is of ``rows[tokens[i]]``.
        bias: ``(E, O)``, contiguous; added to the products, not to rows of no expert.

    Returns:
        ``(N, O)``, dtype of ``rows``.
    """
    num_rows, num_in = rows.shape if tokens is None else (tokens.shape[0], rows.shape[1])
    num_experts, num_out, _ = weight.shape
    out = rows.new_empty(num_rows, num_out)
    if out.numel() == 0:
        return out
    tile = tile_for(rows.dtype, num_out, num_in)
    # N rows in at most that many non-empty groups: each group adds less than one tile to N / tile.rows.
    # sym_min and not min, so that a compiled layer is not compiled again where one of the two becomes the smaller.
    most_tiles = num_rows // tile.rows + torch.sym_min(num_experts + 1, num_rows)
    room = torch.cuda.get_device_properties(rows.device).multi_processor_count * tile.per_sm
    programs = torch.sym_min(most_tiles * triton.cdiv(num_out, tile.width), room)
    _with_scratch(
        rows.device,
        lambda: wrap_triton(grouped_mm_kernel)[(programs,)](
            rows,
            expert_offsets if tokens is None else tokens,  # pointers are needed, and not read without tokens or bias
            weight,
            weight if bias is None else bias,
            expert_offsets,
            out,
            num_rows,
            num_experts,
            num_in,
            num_out,
            *weight.stride(),
            GATHER=tokens is not None,
            HAS_BIAS=bias is not None,
            ROWS_TMA=tile.tma and tokens is None and rows_fit_tma(rows),
            WEIGHT_TMA=tile.tma and weight_fits_tma(weight, tile.depth),
            BLOCK_ROWS=tile.rows,
            BLOCK_OUT=tile.width,
            DEPTH=tile.depth,
            BLOCK_EXPERTS=triton.next_power_of_2(num_experts),
            COLUMNS=COLUMN_TILES,
            num_warps=tile.warps,
            num_stages=tile.stages,
        ),
    )
    return out


def grouped_mm_weight_grad(
    grad: Tensor,
    rows: Tensor,
    expert_offsets: Tensor,
    *,
    grad_tokens: Tensor | None = None,
    row_tokens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradient of ``weight`` in :func:`grouped_mm`: ``grad[e's rows].T @ rows[e's rows]``.

    Args:
        grad: ``(N, O)``, contiguous; ``(T, O)`` with ``grad_tokens``.
        rows: ``(N, I)``, contiguous; ``(T, I)`` with ``row_tokens``.
        expert_offsets: ``(E + 1,)`` int32.
        grad_tokens: ``(N,)`` int32; row i is ``grad[grad_tokens[i]]``. Not together with ``row_tokens``.
        row_tokens: ``(N,)`` int32; row i is ``rows[row_tokens[i]]``.
        out_dtype: of the result; the dtype of ``rows`` if None. Sums are float32 in any case.

    Returns:
        ``(E, O, I)``; zero for an expert without rows.
    """
    assert grad_tokens is None or row_tokens is None, "the kernel gathers one operand, its left"
    num_experts = expert_offsets.shape[0] - 1
    out = rows.new_empty(num_experts, grad.shape[1], rows.shape[1], dtype=out_dtype)
    if out.numel() == 0:
        return out
    # The left operand may be gathered: it has the narrower side of a tile, so fewer addresses.
    left, right, tokens = (grad, rows, grad_tokens) if row_tokens is None else (rows, grad, row_tokens)
    tile = tile_for(rows.dtype, right.shape[1], left.shape[1])
    tiles = triton.cdiv(left.shape[1], tile.rows) * triton.cdiv(right.shape[1], tile.width)
    _with_scratch(
        rows.device,
        lambda: wrap_triton(weight_grad_kernel)[(num_experts * triton.cdiv(tiles, tile.strip),)](
            left,
            expert_offsets if tokens is None else tokens,  # a pointer is needed, and not read
            right,
            expert_offsets,
            out,
            left.shape[1],
            right.shape[1],
            TRANSPOSED=row_tokens is not None,
            GATHER=tokens is not None,
            LEFT_TMA=tile.tma and tokens is None and rows_fit_tma(left),
            RIGHT_TMA=tile.tma and rows_fit_tma(right),
            BLOCK_LEFT=tile.rows,
            BLOCK_RIGHT=tile.width,
            DEPTH=tile.depth,
            STRIP=tile.strip,
            num_warps=tile.warps,
            num_stages=tile.stages,
        ),
    )
    return out


def grouped_sum(
    rows: Tensor,
    expert_offsets: Tensor,
    *,
    tokens: Tensor | None = None,
    row_weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The sum of each expert's rows, in their order: the gradient of a bias.

    Args:
        rows: ``(N, O)``, contiguous; ``(T, O)`` with ``tokens``.
        expert_offsets: ``(E + 1,)`` int32.
        tokens: ``(N,)`` int32; row i is ``rows[tokens[i]]``.
        row_weights: ``(N,)`` float32; row i is multiplied by ``row_weights[i]``.
        out_dtype: of the result; the dtype of ``rows`` if None. Sums are float32 in any case.

    Returns:
        ``(E, O)``; zero for an expert without rows.
    """
    num_experts, dim = expert_offsets.shape[0] - 1, rows.shape[1]
    out = rows.new_empty(num_experts, dim, dtype=out_dtype)
    if out.numel() == 0:
        return out
    wrap_triton(grouped_sum_kernel)[(num_experts, triton.cdiv(dim, SUM_BLOCK_DIM))](
        rows,
        expert_offsets if tokens is None else tokens,  # pointers are needed, and not read
        expert_offsets if row_weights is None else row_weights,
        expert_offsets,
        out,
        dim,
        GATHER=tokens is not None,
        WEIGHTED=row_weights is not None,
        BLOCK_ROWS=SUM_BLOCK_ROWS,
        BLOCK_DIM=SUM_BLOCK_DIM,
    )
    return out


def grouped_mm_op(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """:func:`grouped_mm` with the arguments of the registered op."""
    return grouped_mm(rows, weight, expert_offsets)


def grouped_mm_weight_grad_op(grad: Tensor, rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """:func:`grouped_mm_weight_grad` with the arguments of the registered op."""
    return grouped_mm_weight_grad(grad, rows, expert_offsets)
