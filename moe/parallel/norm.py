"""The norm of all gradients of a model that is spread over ranks, and clipping by it."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(gradients: Iterable[tuple[Tensor, int]], norm_type: float = 2.0) -> Tensor:
    """The norm over all ranks; the same bits on each.

    One all-reduce over the world: a part that several ranks hold counts as many times and is divided by their number.

    Args:
        gradients: each with how many ranks of the world hold the same part of it.
        norm_type: p of the p-norm; ``inf`` for the largest magnitude.

    Returns:
        Scalar, float32 (float64 if any gradient is).
    """
    parts = [(local_part(gradient), copies) for gradient, copies in gradients]
    exact = torch.float64 if any(part.dtype == torch.float64 for part, _ in parts) else torch.float32
    device = parts[0][0].device if parts else torch.device("cpu")
    largest = math.isinf(norm_type)
    terms = [torch.zeros((), dtype=exact, device=device)]
    for part, copies in parts:
        if part.numel():
            size = torch.linalg.vector_norm(part, norm_type, dtype=exact)
            terms.append(size if largest else size**norm_type / copies)
    total = torch.stack(terms)
    total = total.amax() if largest else total.sum()
    dist.all_reduce(total, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return total if largest else total ** (1 / norm_type)


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> Tensor:
    """Scale the gradients so that their norm is at most ``max_norm``; as ``torch.nn.utils.clip_grad_norm_`` does.

    Returns:
        The factor, at most 1.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(local_part(parameter.grad))
    for dtype, gradients in by_dtype.items():
        torch._foreach_mul_(gradients, factor.to(dtype))
    return factor


def copies_of(parameter: Tensor, ranks: int) -> int:
    """How many of the ranks that hold a DTensor hold the same part of it; all of them, for a plain tensor."""
    if not isinstance(parameter, DTensor):
        return ranks
    sizes = zip(parameter.device_mesh.shape, parameter.placements)
    return ranks // math.prod(size for size, placement in sizes if not placement.is_replicate())
