"""The settings of a training run, checked before anything is built."""

from dataclasses import dataclass
from enum import StrEnum
from typing import final

import torch

from moe.config import option, require_positive
from moe.errors import ConfigError


class Precision(StrEnum):
    """The arithmetic of the forward and backward pass; parameters and optimizer state are float32 in either."""

    AUTO = "auto"
    """bfloat16 where the device multiplies it in hardware, else float32."""
    FLOAT32 = "float32"
    """No autocast."""
    BFLOAT16 = "bfloat16"
    """Autocast to bfloat16; routers stay in float32."""


@final
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on what, and how often something is written down.

    Raises:
        ConfigError: a value is out of its range.
    """

    steps: int
    """Optimizer steps."""

    batch_size: int
    """Sequences in a micro-batch."""

    seq_len: int
    """Predictions in a sequence."""

    accumulation: int = 1
    """Micro-batches in an optimizer step."""

    clip_norm: float = 1.0
    """Largest norm of all gradients together."""

    precision: str = "auto"
    """See `Precision`."""

    seed: int = 0
    """Of the order of the data; seed the model's weights before you make it."""

    log_every: int = 10
    """Steps between two training lines."""

    eval_every: int = 100
    """Steps between two validations; there is one at the end in any case."""

    eval_windows: int = 128
    """Sequences in a validation, spread evenly over the validation text."""

    checkpoint_every: int = 100
    """Steps between two checkpoints; there is one at the end in any case."""

    keep_checkpoints: int = 3
    """How many of the last checkpoints to keep."""

    max_skipped: int = 10
    """Steps in a row whose loss or gradient is not finite after which the run stops."""

    pool_steps: int = 50
    """Steps whose counts are pooled into one measure of balance."""

    def __post_init__(self) -> None:
        option(Precision, "precision", self.precision)
        names = (
            *("steps", "batch_size", "seq_len", "accumulation", "clip_norm", "log_every", "eval_every", "eval_windows"),
            *("checkpoint_every", "keep_checkpoints", "max_skipped", "pool_steps"),
        )
        require_positive(**{name: getattr(self, name) for name in names})

    @property
    def tokens_per_step(self) -> int:
        """Tokens that an optimizer step learns from."""
        return self.batch_size * self.seq_len * self.accumulation

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """What autocast computes in on a device; None for no autocast."""
        if self.precision == Precision.AUTO:
            return torch.bfloat16 if multiplies_bfloat16(device) else None
        return torch.bfloat16 if self.precision == Precision.BFLOAT16 else None


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions that multiply bfloat16, rather than converting it to float32 and back."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def pick_device(name: str) -> torch.device:
    """The device that a config names; ``"auto"`` is a GPU where there is one.

    Raises:
        ConfigError: torch does not know the device, or does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r} cannot be used: {error}") from None
    return device
