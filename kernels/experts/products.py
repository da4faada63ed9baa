"""Products of one expert's rows with its matrix on the CPU, in the dtype that this CPU multiplies fast."""

from functools import cache

import torch
from torch import Tensor

from moe.kernels.invariant import multiply_invariant


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to multiply tensors of ``dtype`` in.

    A CPU without instructions for half precision multiplies it several times to fifty times slower than float32,
    which is then both faster, copies included, and more exact.
    """
    supported = {
        torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    if dtype not in supported or (torch.backends.mkldnn.is_available() and supported[dtype]()):
        return dtype
    return torch.float32


class Products:
    """Products into memory that is there; keeps the scratch memory for what has to be converted.

    Args:
        dtype: of the matrices; the products' is ``self.dtype``.
        batch_invariant: let a row's product depend on nothing else, see :mod:`moe.kernels.invariant`.
    """

    def __init__(self, dtype: torch.dtype, *, batch_invariant: bool = False) -> None:
        self.dtype = product_dtype(dtype)
        self.batch_invariant = batch_invariant
        self._matrices: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def rows(self, rows: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
        """``out = rows @ matrix``.

        Args:
            rows: ``(n, I)`` in ``self.dtype``.
            matrix: ``(I, O)``, any floating dtype and strides.
            out: ``(n, O)`` in ``self.dtype``; written, and returned.
        """
        matrix = self._converted(matrix)
        return multiply_invariant(rows, matrix, out) if self.batch_invariant else torch.mm(rows, matrix, out=out)

    def weight_grad(self, grad: Tensor, rows: Tensor, out: Tensor) -> None:
        """``out = grad.T @ rows``, summed over an expert's rows; zero without rows.

        Args:
            grad: ``(n, O)`` in ``self.dtype``.
            rows: ``(n, I)`` in ``self.dtype``.
            out: ``(O, I)``, any floating dtype; written.
        """
        if grad.shape[0] == 0:
            out.zero_()
        elif out.dtype == grad.dtype:
            torch.mm(grad.t(), rows, out=out)
        else:
            precise = torch.promote_types(out.dtype, grad.dtype)
            product = self._scratch(out.shape, precise)
            out.copy_(torch.mm(grad.to(precise).t(), rows.to(precise), out=product))

    def _converted(self, matrix: Tensor) -> Tensor:
        if matrix.dtype == self.dtype:
            return matrix
        if matrix.t().is_contiguous():  # copied as it lies in memory, ten times as fast
            return self._scratch(matrix.t().shape, self.dtype).copy_(matrix.t()).t()
        return self._scratch(matrix.shape, self.dtype).copy_(matrix)

    def _scratch(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if (shape, dtype) not in self._matrices:
            self._matrices[shape, dtype] = torch.empty(shape, dtype=dtype)
        return self._matrices[shape, dtype]
