"""What a measurement was made on."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16", "i8mm")
"""What decides how fast a CPU multiplies matrices, in Linux' words."""

PACKAGES = ("torch", "triton", "transformers", "torchtitan", "megatron-core")


def hardware(device: str) -> str:
    """A short name for files."""
    if device.startswith("cuda"):
        return re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device)).strip("-")
    return f"{platform.machine()}_{torch.get_num_threads()}cores"


def describe(device: str) -> list[str]:
    """Lines of Markdown: versions, the processor with the flags that matter, threads, load, the GPU if one is used."""
    flags = [flag for flag in FLAGS if flag in cpu_fact("flags", "Features").split()]
    name = cpu_fact("model name") or platform.processor() or platform.machine()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    used = torch.backends.cpu.get_cpu_capability()
    versions = [f"Python {platform.python_version()}", *(f"{package} {installed(package)}" for package in PACKAGES)]
    lines = [
        f"{', '.join(versions)}.",
        f"CPU: {name} ({' '.join(flags) or 'no known flags'}; PyTorch uses {used}), "
        f"{torch.get_num_threads()} threads of {os.cpu_count()}, load average {load} at the start.",
    ]
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        lines.append(
            f"GPU: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}."
        )
    return lines


def installed(package: str) -> str:
    """The version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_fact(*keys: str) -> str:
    """A line of /proc/cpuinfo, of the first processor; empty where there is no such line."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""
