"""Ranks that were started with different settings, or call a layer in different ways, find out before they hang."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moe.errors import ConfigError, ParallelError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DESCRIBED = ("dtype of x", "dtype of the weights", "grad mode", "dim", "top_k")


def require_same_everywhere(settings: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Compare settings over the ranks of a group.

    Args:
        settings: by what they are called in the error.
        group: who compares.

    Raises:
        ConfigError: on every rank, where one differs; names the setting and the ranks that differ from rank 0.
    """
    own = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in settings.items()}
    everywhere: list[dict[str, str]] = [{} for _ in range(group.size())]
    dist.all_gather_object(everywhere, own, group)
    for name in everywhere[0]:
        differing = [rank for rank, theirs in enumerate(everywhere) if theirs.get(name) != everywhere[0][name]]
        if differing:
            raise ConfigError(
                f"ranks differ in {name}: {', '.join(map(str, differing))} from the first; this is rank "
                f"{group.rank()} of {group.size()} with {settings.get(name, '')[:2000]}"
            )


def describe_call(x: Tensor, weights: Tensor) -> list[int]:
    """A dispatcher's call in whole numbers, for ranks to tell each other.

    Args:
        x: ``(T, D)``, tokens.
        weights: ``(T, K)``.

    Returns:
        Whether a gradient of either is needed; then what all ranks must have alike.
    """
    enabled = torch.is_grad_enabled()
    needs_gradient = enabled and (x.requires_grad or weights.requires_grad)
    alike = [_DTYPES.index(x.dtype), _DTYPES.index(weights.dtype), int(enabled), x.shape[1], weights.shape[1]]
    return [int(needs_gradient), *alike]


def require_same_call(calls: NDArray[np.int64]) -> bool:
    """Compare the calls of several ranks.

    Args:
        calls: ``(ranks, ...)``; a row is what :func:`describe_call` returned.

    Returns:
        Whether any rank needs a gradient.

    Raises:
        ParallelError: on every rank, where they differ: rows of one would be read as something else by another, or a
            rank would wait in backward for one that has none.
    """
    for name, column in zip(_DESCRIBED, calls[:, 1:].T):
        if (column != column[0]).any():
            said = [_said(name, int(value)) for value in column]
            raise ParallelError(f"{name} must be the same on all ranks of an exchange, but is {', '.join(said)}")
    return bool(calls[:, 0].any())


def _said(name: str, value: int) -> str:
    if name == "grad mode":
        return "on" if value else "off"
    return str(_DTYPES[value]) if name.startswith("dtype") else str(value)
