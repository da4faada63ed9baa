"""Which implementation of an op runs, and how an op is registered with PyTorch.

An op has one implementation a backend: ``"reference"`` (PyTorch; the definition, and the path of the CPU) and
``"triton"`` (GPUs). Each is an op of its own for ``torch.library``: one op with two kernels could not be compiled,
because the compiler traces *into* a Triton op on whatever device it runs.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op, triton_op

from moe.errors import ConfigError, DtypeError

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REFERENCE_DTYPES = (*TRITON_DTYPES, torch.float64)

# The Triton modules are imported here and now or never: importing them on the first GPU tensor would hide an import
# in a call, where torch.compile cannot follow it. A PyTorch built without GPUs does not pay for them (0.8 s).
# is_built() comes first because is_available() on a GPU build starts the driver, after which a process cannot fork;
# on a CPU build it asks nothing, and is true only where an interpreter stands in for the GPU.
HAS_TRITON = find_spec("triton") is not None and (torch.backends.cuda.is_built() or torch.cuda.is_available())


def register(
    name: str,
    fake: Callable[..., object],
    reference: Callable[..., object],
    triton: Callable[..., object] | None,
) -> dict[str, CustomOpDef]:
    """Register an op that changes none of its arguments, once a backend.

    Args:
        name: without namespace; the op becomes ``moe::<name>``, and ``moe::<name>_triton`` on GPUs.
        fake: what the op returns, as empty tensors of the right shape, dtype and device.
        reference: the PyTorch implementation. Opaque to the compiler, so it may read values of CPU tensors.
        triton: the function that launches the kernels through ``wrap_triton``; None without Triton. The kernels are
            ``no_type_check``: Triton compiles their source, which type checkers that wrap functions would hide.

    Returns:
        The op of each backend, by the backend's name.
    """
    ops = {"reference": custom_op(f"moe::{name}", reference, mutates_args=())}
    if triton is not None:
        ops["triton"] = cast(CustomOpDef, triton_op(f"moe::{name}_triton", triton, mutates_args=()))
    for op in ops.values():
        op.register_fake(fake)
    return ops


def backend_of(tensor: Tensor) -> str:
    """Name the backend for a tensor: "reference" on the CPU (and for ``meta``), "triton" on a GPU.

    Raises:
        ConfigError: the device has no backend, Triton is not installed, or the device is not the current one.
    """
    device = tensor.device.type
    if device in ("cpu", "meta"):
        return "reference"
    if device == "cuda" and HAS_TRITON:  # ROCm's devices are called cuda too
        if not torch.compiler.is_compiling():
            _require_current(tensor.device)
        return "triton"
    needs = "needs the package triton" if device == "cuda" else "has no kernels: use a cpu or cuda tensor"
    raise ConfigError(f"device={tensor.device} {needs}")


def _require_current(device: torch.device) -> None:
    """Triton launches on the current GPU and its stream, wherever the tensors are."""
    # CUDA has not started where a tensor only stands for one on a GPU.
    if torch.cuda.is_initialized() and device.index != (current := torch.cuda.current_device()):
        raise ConfigError(
            f"device={device} is not the current one, cuda:{current}, where Triton launches: "
            f"call torch.cuda.set_device({device.index}) before, or work in `with torch.cuda.device({device.index})`"
        )


def check_float(name: str, tensor: Tensor) -> None:
    """Check that a tensor has a dtype which the kernels of its device compute with.

    Raises:
        DtypeError: not floating point, 8 bits or fewer, or float64 on a GPU.
    """
    if not tensor.dtype.is_floating_point:
        raise DtypeError(f"{name} has dtype {tensor.dtype}, must be floating point")
    if tensor.device.type == "cuda" and tensor.dtype not in TRITON_DTYPES:
        raise DtypeError(f"{name} has dtype {tensor.dtype}, must be bfloat16, float16 or float32 on a GPU")
    if tensor.dtype not in REFERENCE_DTYPES:
        raise DtypeError(f"{name} has dtype {tensor.dtype}, must be bfloat16, float16, float32 or float64")
