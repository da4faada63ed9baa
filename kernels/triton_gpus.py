"""Which GPUs the kernels run on."""

import triton

from moe.errors import ConfigError

SUPPORTED = "NVIDIA from compute capability 8.0 (Ampere) on, and AMD gfx90a, gfx942 and gfx950"
AMD_ARCHS = ("gfx90a", "gfx942", "gfx950")  # with matrix cores for bfloat16 and float16


def family_of(backend: str, arch: int | str) -> str | None:
    """Name the family of GPUs with one list of tiles, None for one that is not supported.

    Args:
        backend: as Triton calls it, "cuda" or "hip".
        arch: compute capability times ten, or the name of an AMD architecture.
    """
    if backend == "hip":
        return "cdna" if str(arch).split(":")[0] in AMD_ARCHS else None
    if backend != "cuda" or int(arch) < 80:
        return None
    if int(arch) == 90:
        return "hopper"
    return "blackwell" if 100 <= int(arch) < 120 else "ampere"  # 12.x, the consumers' Blackwell, has no tcgen05


def require_supported_gpu() -> str:
    """The family of the current GPU, see :func:`family_of`; does not synchronise.

    Raises:
        ConfigError: there are no kernels for this GPU.
    """
    target = triton.runtime.driver.active.get_current_target()
    family = family_of(target.backend, target.arch)
    if family is None:
        raise ConfigError(
            f"device is a {target.backend} GPU of architecture {target.arch}; the kernels run on {SUPPORTED}: "
            "move the layer and its input to the CPU, or use one of those"
        )
    return family
