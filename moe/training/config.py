"""The settings of a training run, checked before anything is built."""

from dataclasses import dataclass
from enum import StrEnum
from typing import final

import torch

from moe.config import option, require_positive, require_positive_integer
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
    """Sequences in a micro-batch, over all devices."""

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
        require_positive(clip_norm=self.clip_norm)
        whole = (
            *("steps", "batch_size", "seq_len", "accumulation", "log_every", "eval_every", "eval_windows"),
            *("checkpoint_every", "keep_checkpoints", "max_skipped", "pool_steps"),
        )
        require_positive_integer(**{name: getattr(self, name) for name in whole})
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed={self.seed!r} must be a whole number")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that an optimizer step learns from."""
        return self.batch_size * self.seq_len * self.accumulation

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """What autocast computes in on a device; None for no autocast."""
        if self.precision == Precision.AUTO:
            return torch.bfloat16 if multiplies_bfloat16(device) else None
        return torch.bfloat16 if self.precision == Precision.BFLOAT16 else None


@final
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run lies, what it runs on, and what it is asked to write at the end.

    Raises:
        ConfigError: a value is of the wrong type or out of its range.
    """

    name: str | None = None
    """The run's folder below ``root``; None is the date and time."""

    root: str = "runs"
    """The folder of all runs."""

    device: str = "auto"
    """A device of torch; ``auto`` is a GPU where there is one."""

    threads: int | None = None
    """Of the CPU; None leaves PyTorch's choice."""

    prompt: str = ""
    """What the trained model is asked to continue."""

    sample_tokens: int = 200
    """How many tokens it may add; 0 for no sample."""

    def __post_init__(self) -> None:
        for name in ("root", "device", "prompt"):
            require_text(name, getattr(self, name))
        if self.name is not None:
            require_text("name", self.name)
        if self.threads is not None:
            require_positive_integer(threads=self.threads)
        if isinstance(self.sample_tokens, bool) or not isinstance(self.sample_tokens, int) or self.sample_tokens < 0:
            raise ConfigError(f"sample_tokens={self.sample_tokens!r} must be a whole number, 0 or more")


@final
@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Over how many devices a run goes, and in which way; see `moe.parallel.Degrees` for the first six.

    Raises:
        ConfigError: a value is of the wrong type or out of its range.
    """

    pp: int = 1
    """Pipeline stages."""

    dp_replicate: int = 1
    """Groups of ranks that hold the same parameters and see different data."""

    dp_shard: int | None = None
    """Ranks that see different data and share parameters and optimizer state; None is what the others leave."""

    tp: int = 1
    """Ranks that see the same data and divide what is inside a block."""

    ep: int = 1
    """Ranks that divide the routed experts."""

    etp: int = 1
    """Ranks that divide the hidden dimension of each routed expert."""

    chunks: int = 1
    """Parts in which tokens travel to their experts; with more than one, they travel while others are computed."""

    max_received_tokens: int | None = None
    """Tokens that a rank's experts take at a time; more go in further rounds. None for no limit."""

    node_size: int | None = None
    """Consecutive ranks that share a node, to which a token then crosses once; None where all links count alike."""

    microbatches: int | None = None
    """Parts of a rank's sequences that go through the pipeline one after another; None for as many as stages."""

    stages_per_rank: int = 1
    """Pipeline stages that a rank has; more than one interleaves them."""

    timeout: float = 600.0
    """Seconds after which ranks that wait for one which does not answer end."""

    def __post_init__(self) -> None:
        whole = ("pp", "dp_replicate", "tp", "ep", "etp", "chunks", "stages_per_rank")
        require_positive_integer(**{name: getattr(self, name) for name in whole})
        open_ended = ("dp_shard", "max_received_tokens", "node_size", "microbatches")
        require_positive_integer(**{n: size for n in open_ended if (size := getattr(self, n)) is not None})
        require_positive(timeout=self.timeout)
        stages = self.pp * self.stages_per_rank
        if self.pp > 1 and (self.num_microbatches < stages or self.num_microbatches % self.pp):
            raise ConfigError(
                f"microbatches={self.microbatches} must be a multiple of pp={self.pp}, and at least the {stages} stages"
            )

    @property
    def num_microbatches(self) -> int:
        """Parts of a rank's sequences; 1 without a pipeline."""
        return 1 if self.pp == 1 else self.microbatches or self.pp * self.stages_per_rank

    @property
    def axes(self) -> dict[str, int]:
        """The degrees that are given."""
        named = {name: getattr(self, name) for name in ("pp", "dp_replicate", "dp_shard", "tp", "ep", "etp")}
        return {name: size for name, size in named.items() if size is not None}


def require_text(name: str, value: object) -> None:
    """Raise a ConfigError unless a setting is text; a number in YAML is not, unless it is quoted."""
    if not isinstance(value, str):
        raise ConfigError(f"{name}={value!r} must be text; put it in quotes")


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
