"""The rows of the experts' operation on the CPU: in blocks of whole experts, with scratch memory for one block.

A block of small experts has few enough rows to stay in the cache between the small operations, and enough to keep all
cores busy. An expert with many rows is a block by itself. Products are made per expert, into memory that is there.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moe.kernels.combine.reference import accumulation_dtype
from moe.kernels.experts.products import Products
from moe.kernels.plan.reference import checked_offsets

BLOCK_ROWS = 256
"""The most rows of a block that has more than one expert."""


@dataclass(frozen=True)
class Block:
    """Consecutive experts and the rows they own: ``sizes[i]`` of ``rows`` are those of ``experts[i]``."""

    experts: range
    rows: slice
    sizes: list[int]

    @property
    def num_rows(self) -> int:
        """How many rows the block has."""
        return self.rows.stop - self.rows.start

    def by_expert(self, rows: Tensor) -> list[tuple[int, Tensor]]:
        """Each expert with its part of the block's rows, which may be empty."""
        return list(zip(self.experts, rows.split(self.sizes)))


def make_blocks(offsets: list[int]) -> list[Block]:
    """All experts in order, as many in a block as have up to BLOCK_ROWS rows together, but one at least."""
    blocks, first = [], 0
    for end in range(1, len(offsets)):
        if end + 1 == len(offsets) or offsets[end + 1] - offsets[first] > BLOCK_ROWS:
            sizes = [stop - start for start, stop in pairwise(offsets[first : end + 1])]
            blocks.append(Block(range(first, end), slice(offsets[first], offsets[end]), sizes))
            first = end
    return blocks


class Rows:
    """What the blocks of one call share.

    Three dtypes: that of the operands; ``products.dtype``, which this CPU multiplies in; and ``exact``, float32 at
    least, of the activation and of sums.

    Args:
        x: ``(T, D)``; for its dtype.
        weights: ``(T, K)``, contiguous.
        assignments: ``(N,)`` int32.
        expert_offsets: ``(E + 1,)`` int32.
        batch_invariant: see :class:`moe.kernels.experts.products.Products`.

    Attributes:
        assignments: those that have an expert, in row order.
        weights: ``(rows, 1)``; each row's routing weight.

    Raises:
        ShapeError: ``expert_offsets`` does not ascend from 0 to at most N.
    """

    def __init__(
        self, x: Tensor, weights: Tensor, assignments: Tensor, expert_offsets: Tensor, *, batch_invariant: bool
    ) -> None:
        offsets = checked_offsets(expert_offsets, assignments.shape[0])
        self.blocks = make_blocks(offsets)
        self.assignments = assignments[: offsets[-1]]
        self.weights = weights.view(-1).index_select(0, self.assignments)[:, None]
        self.products = Products(x.dtype, batch_invariant=batch_invariant)
        self.exact = accumulation_dtype(x.dtype)
        self._tokens = self.assignments // weights.shape[1]
        self._most_rows = max(block.num_rows for block in self.blocks)
        self._scratch: dict[str, Tensor] = {}

    def scratch(self, name: str, block: Block, width: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised ``(rows of the block, width)``; a name stands for the same memory in every block."""
        if name not in self._scratch:
            self._scratch[name] = torch.empty(self._most_rows, width, dtype=dtype)
        return self._scratch[name][: block.num_rows]

    def to(self, dtype: torch.dtype, name: str, block: Block, rows: Tensor) -> Tensor:
        """The rows as they are if of this dtype, else a copy in scratch memory."""
        if rows.dtype == dtype:
            return rows
        return self.scratch(f"{name} as {dtype}", block, rows.shape[1], dtype).copy_(rows)

    def exact_up(self, block: Block, up: Tensor) -> Tensor:
        """The up projection in ``exact``, for the activation.

        Batch-invariant, it lies in memory with gaps. PyTorch computes exp and erf in vectors as far as they fill, and
        the rest of a stretch one by one, with other last bits: which of the two it is depends on a row's place, but in
        memory with gaps all go one by one.
        """
        if not self.products.batch_invariant:
            return self.to(self.exact, "up", block, up)
        return self.scratch("up with gaps", block, 2 * up.shape[1], self.exact)[:, ::2].copy_(up)

    def gather(self, name: str, source: Tensor, block: Block) -> Tensor:
        """The rows' tokens in ``source (T, D)``, ready to be multiplied."""
        rows = self.scratch(name, block, source.shape[1], source.dtype)
        torch.index_select(source, 0, self._tokens[block.rows], out=rows)
        return self.to(self.products.dtype, name, block, rows)

    def multiply(self, name: str, rows: Tensor, matrices: Tensor, block: Block, out: Tensor | None = None) -> Tensor:
        """Each expert's rows times its matrix, one of ``(E, I, O)``; into ``out`` or else scratch memory."""
        if out is None:
            out = self.scratch(name, block, matrices.shape[2], self.products.dtype)
        for (expert, part), product in zip(block.by_expert(rows), out.split(block.sizes)):
            if part.shape[0]:
                self.products.rows(part, matrices[expert], product)
        return out

    def add_to_tokens(self, name: str, rows: Tensor, tokens: Tensor, block: Block) -> None:
        """Add the block's rows to their tokens in ``tokens (T, D)``, of dtype ``exact``, one after another."""
        tokens.index_add_(0, self._tokens[block.rows], self.to(self.exact, name, block, rows))

    def weight_grad(self, grad: Tensor, rows: Tensor, block: Block, out: Tensor) -> None:
        """Each expert's ``grad.T @ rows`` into its part of ``out (E, O, I)``."""
        for (expert, part), part_rows in zip(block.by_expert(grad), rows.split(block.sizes)):
            self.products.weight_grad(part, part_rows, out[expert])

    def up(self, x: Tensor, weight: Tensor, bias: Tensor | None, block: Block, out: Tensor | None = None) -> Tensor:
        """The up projection of the block's rows, rounded to the dtype of ``x``; into ``out`` or else scratch memory."""
        direct = out if x.dtype == self.products.dtype else None
        up = self.multiply("up", self.gather("x", x, block), weight.transpose(1, 2), block, direct)
        if bias is not None:
            for expert, part in block.by_expert(up):
                part += bias[expert]
        return self.to(x.dtype, "up", block, up) if out is None or direct is not None else out.copy_(up)
