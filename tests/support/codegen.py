"""Compiles kernels for a GPU that is not there, and says what is wrong with the machine code.

``python -m tests.support.codegen sm90`` prints a line for every launch of tests/kernels/codegen_cases.py, and leaves
with 1 if one spills, does not fit, or does not use the matrix instructions of its GPU. A process of its own, because
Triton compiles the source of a function, which a test run wraps in checks of its annotations.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Gpu:
    """A GPU to compile for: its shared memory for one program in bytes, and its matrix instructions by dtype."""

    target: GPUTarget
    shared_memory: int
    matrix: str
    processors: int


GPUS = {
    "sm80": Gpu(GPUTarget("cuda", 80, 32), 166_912, "mma.sync", 108),
    "sm86": Gpu(GPUTarget("cuda", 86, 32), 101_376, "mma.sync", 84),  # Ampere's tiles where there is less memory
    "sm90": Gpu(GPUTarget("cuda", 90, 32), 232_448, "wgmma.mma_async", 132),
    "sm100": Gpu(GPUTarget("cuda", 100, 32), 232_448, "tcgen05.mma", 148),
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 65_536, "v_mfma_", 304),
}


class _Driver:
    """What Triton asks of a driver before a launch."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        properties = {"max_shared_mem": gpu.shared_memory, "multiprocessor_count": gpu.processors}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> GPUTarget:
        return self._gpu.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class _CudaOnCpu(torch.overrides.TorchFunctionMode):
    """Tensors asked for on a GPU are made on the CPU: only their shapes and addresses' alignment count."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))


@contextmanager
def pretended(gpu: Gpu) -> Iterator[None]:
    """Inside, launch functions choose tiles for a GPU that is not there."""
    properties = SimpleNamespace(multi_processor_count=gpu.processors)
    triton.runtime.driver.set_active(_Driver(gpu))
    with patch.object(torch.cuda, "get_device_properties", lambda device: properties):
        yield


@contextmanager
def recorded(gpu: Gpu) -> Iterator[list[Any]]:
    """Inside, kernels are compiled for a GPU where they would be launched; yields the compiled kernels."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with pretended(gpu), patch.object(JITFunction, "run", compile_only), _CudaOnCpu():
        yield compiled


def stack_bytes(kernel: Any, gpu: Gpu) -> int:
    """Bytes of a thread's memory on its stack: what does not fit in registers goes there, and nothing else does."""
    if gpu.target.backend == "hip":
        return int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", kernel.asm["amdgcn"])[1])  # type: ignore[index]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]


def layouts(kernel: Any, shape: str) -> set[str]:
    """How loads and stores of tiles of a shape, such as 8x256, deal their elements out to threads."""
    access = re.compile(rf"(?:tt\.(?:load|store)|amdg\.buffer_(?:load|store)).*tensor<{shape}x.*?(#blocked\d*)")
    return {found[1] for line in kernel.asm["ttgir"].splitlines() if (found := access.search(line))}


def complaints(kernel: Any, gpu: Gpu) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    found = []
    if spilled := stack_bytes(kernel, gpu):
        found.append(f"spills {spilled} bytes a thread")
    if kernel.metadata.shared > gpu.shared_memory:
        found.append(f"takes {kernel.metadata.shared} bytes of shared memory, {gpu.shared_memory} at most")
    code = kernel.asm["amdgcn" if gpu.target.backend == "hip" else "ptx"]
    if "tt.dot" in kernel.asm["ttir"] and gpu.matrix not in code:
        found.append(f"multiplies without {gpu.matrix}")
    return found


def check(name: str, cases: dict[str, Callable[[], None]]) -> list[str]:
    """Compile cases for a GPU, print a line for each launch, and return those with a complaint."""
    gpu, bad = GPUS[name], []
    for case, launch in cases.items():
        with recorded(gpu) as compiled:
            launch()
        found = [(kernel.metadata.name, complaints(kernel, gpu)) for kernel in compiled]
        for kernel, faults in found or [("host code", ["launches nothing"])]:
            line = f"{name} {case}: {kernel}: {'; '.join(faults) or 'fine'}"
            print(line, flush=True)
            bad += [line] if faults else []
    return bad


if __name__ == "__main__":
    from tests.kernels.codegen_cases import CASES, OTHER_TILES

    sys.exit("\n".join(check(sys.argv[1], CASES | OTHER_TILES)) or None)
