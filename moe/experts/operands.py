"""The dtype that the experts compute in."""

from typing import Any

import torch
from torch import Tensor

from moe.errors import DtypeError


def in_one_dtype(x: Tensor, *parameters: Tensor | None) -> list[Any]:
    """Tokens and parameters as they are, or all in the autocast dtype where autocast is on.

    Raises:
        DtypeError: tokens and parameters differ in dtype outside autocast.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
        return [None if tensor is None else tensor.to(dtype) for tensor in (x, *parameters)]
    for parameter in parameters:
        if parameter is not None and parameter.dtype != x.dtype:
            raise DtypeError(
                f"x is {x.dtype} but the experts' weights are {parameter.dtype}; convert one of them, or use autocast"
            )
    return [x, *parameters]
