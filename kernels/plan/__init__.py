"""The plan: which row of the experts' operation each assignment gets.

Example, 3 tokens, K=2, E=4. Assignment ``t * K + k`` is token t's k-th choice; -1 is no expert::

    expert_ids     = [[0, 2], [1, 0], [3, -1]]
    assignments    = [0, 3, 2, 1, 4, 5]         # by expert, then by token; no expert last
    expert_offsets = [0, 2, 3, 4, 5]            # expert 0 owns rows 0 and 1; row 5 belongs to none
    rows           = [[0, 3], [2, 1], [4, -1]]  # the inverse of assignments
"""

import torch
from torch import Tensor

from moe.errors import ConfigError, DtypeError, ShapeError
from moe.kernels.backends import HAS_TRITON, backend_of, register
from moe.kernels.plan import reference
from moe.types import Plan

if HAS_TRITON:
    from moe.kernels.plan import triton_backend


def _fake(expert_ids: Tensor, num_experts: int | torch.SymInt) -> tuple[Tensor, Tensor, Tensor]:
    new = expert_ids.new_empty
    return new(expert_ids.numel()), new(num_experts + 1), new(expert_ids.shape)


_MAKE_PLAN = register("make_plan", _fake, reference.make_plan, triton_backend.make_plan if HAS_TRITON else None)


def make_plan(expert_ids: Tensor, num_experts: int) -> Plan:
    """Sort the assignments of a routing decision by expert, with a stable counting sort.

    On a GPU nothing waits for the device. Ids are checked on the CPU, and on a GPU when Triton runs in debug mode
    (``TRITON_DEBUG=1``); without it an id out of range counts as no expert.

    Args:
        expert_ids: ``(T, K)`` int32, values in -1 .. num_experts - 1; -1 is no expert.
        num_experts: E.

    Returns:
        The plan: ``assignments (T * K,)``, ``expert_offsets (E + 1,)`` and ``rows (T, K)``, int32, on the device of
        ``expert_ids``.

    Raises:
        ShapeError: ``expert_ids`` is not a matrix, has no column, or has 2^31 elements or more.
        DtypeError: ``expert_ids`` is not int32.
        ConfigError: ``num_experts`` is not positive, or an id is out of range.
    """
    if expert_ids.ndim != 2 or expert_ids.shape[1] == 0:
        raise ShapeError(f"expert_ids has shape {tuple(expert_ids.shape)}, must be (tokens, top_k) with top_k > 0")
    if expert_ids.numel() >= 2**31:
        raise ShapeError(f"expert_ids has {expert_ids.numel()} elements, must have less than 2^31: rows are int32")
    if expert_ids.dtype != torch.int32:
        raise DtypeError(f"expert_ids has dtype {expert_ids.dtype}, must be int32")
    if num_experts < 1:
        raise ConfigError(f"num_experts={num_experts} must be at least 1")
    assignments, expert_offsets, rows = _MAKE_PLAN[backend_of(expert_ids)](expert_ids.contiguous(), num_experts)
    return Plan(assignments=assignments, expert_offsets=expert_offsets, rows=rows)
