"""What a run asks of the processes that it runs in, and the answer where there is one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor

from moe.config import require_positive
from moe.parallel.world import is_launched, local_device, meet
from moe.training.config import pick_device

Result = TypeVar("Result")


@runtime_checkable
class Ranks(Protocol):
    """The processes of a run; :class:`moe.parallel.world.World` where there are several."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints, and that writes what there is one of."""
        ...

    def watching(self) -> AbstractContextManager[None]:
        """Have an error inside name the process that was lost."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Let all processes go on after what is inside, or none."""
        ...

    def first(self, function: Callable[[], Result]) -> Result:
        """Have the first process do something for all."""
        ...

    def require_same(self, settings: Mapping[str, str]) -> None:
        """Raise a ConfigError unless the settings are the same in all processes."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        ...

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        ...

    def same(self, values: Tensor) -> Tensor:
        """The first process's values."""
        ...


@final
class Alone:
    """One process, which has nobody to ask."""

    is_first = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Nobody can be lost."""
        yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """Nobody else can fail."""
        yield

    def first(self, function: Callable[[], Result]) -> Result:
        """Do it."""
        return function()

    def require_same(self, settings: Mapping[str, str]) -> None:
        """Nobody can differ."""

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def mean(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def same(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values


@contextmanager
def processes(device: str, timeout: float) -> Iterator[tuple[Ranks, torch.device]]:
    """Find out whether this process is one of several, and meet the others.

    Args:
        device: as a config names it; under a launcher, "cuda" is the GPU of the process's number on the machine.
        timeout: see :func:`moe.parallel.world.meet`.

    Returns:
        Context of the processes, and of this one's device.

    Raises:
        ConfigError: the device cannot be used.
    """
    chosen = pick_device(device)
    require_positive(timeout=timeout)
    if not is_launched():
        yield Alone(), chosen
        return
    if chosen.index is None:
        chosen = pick_device(str(local_device(chosen.type)))
    with meet(chosen, timeout) as world:
        yield world, chosen
