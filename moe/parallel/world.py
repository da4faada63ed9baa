"""The processes of a run: how they meet, agree, and end."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from moe.errors import MoEError, ParallelError
from moe.parallel.attempt import store_of_attempt
from moe.parallel.consistency import require_same_everywhere
from moe.parallel.failure import RollCall, is_collective_failure

Result = TypeVar("Result")


def is_launched() -> bool:
    """Whether this process is one of several that a launcher (torchrun, say) started, or has a process group."""
    return "WORLD_SIZE" in os.environ or dist.is_initialized()


def local_device(kind: str) -> torch.device:
    """This process's device: of GPUs, the one of its number on the machine."""
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def meet(device: torch.device, timeout: float) -> Iterator["World"]:
    """Meet the other processes, and part from them at the end.

    Args:
        device: of this process; GPUs talk over NCCL, CPUs over gloo.
        timeout: seconds after which ranks that wait for one which does not answer have ended. Half of it is a
            collective's, the other half goes to finding out who is missing.

    Returns:
        Context of a :class:`World`. A process group that there is already is used and left as it is.

    Raises:
        ParallelError: the others do not come, or one is lost.
    """
    begun = not dist.is_initialized()
    if begun:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        try:
            store, rank, size = store_of_attempt(timeout / 2)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout / 2)
            )
        except (RuntimeError, ValueError) as error:
            raise ParallelError(f"the processes of the run cannot meet: {error}") from error
    try:
        roll_call = RollCall(timeout / 2)
        try:
            world = World(roll_call, timeout / 2)
            with world.watching():
                yield world
                dist.barrier()  # nobody leaves while another still talks to it
        finally:
            roll_call.close()
    finally:
        if begun:
            dist.destroy_process_group()


@final
class World:
    """What the processes of a run tell each other.

    Methods are collective, but for ``watching`` and ``limit_groups``.

    Args:
        roll_call: finds out who is missing.
        timeout: seconds that a collective may take.
    """

    def __init__(self, roll_call: RollCall, timeout: float) -> None:
        self._roll_call, self._timeout = roll_call, timedelta(seconds=timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints, and that writes what there is one of."""
        return self.rank == 0

    def limit_groups(self) -> None:
        """Give all process groups that there are the run's timeout, where PyTorch gives half an hour to all but one."""
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(self._timeout, group)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Where a collective fails inside, the error names the rank that is missing.

        Raises:
            ParallelError: a collective failed.
        """
        try:
            yield
        except Exception as error:
            if not is_collective_failure(error):
                raise
            raise self._roll_call.explain(error) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """What a rank may find wrong by itself; all of them go on after it, or all end.

        Nothing inside is collective, unless it fails on all ranks alike.

        Raises:
            MoEError: this rank's own.
            ParallelError: another's, with its words.
        """
        own: MoEError | None = None
        try:
            yield
        except MoEError as error:
            own = error
        said: list[str | None] = [None] * self.size
        dist.all_gather_object(said, None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        for rank, words in enumerate(said):
            if words is not None:
                raise ParallelError(f"rank {rank} cannot go on: {words}")

    def first(self, function: Callable[[], Result]) -> Result:
        """Have the first rank do something for all.

        Returns:
            What it returned, on every rank.

        Raises:
            MoEError, OSError: what it raised, on every rank.
        """
        said: list[tuple[Any, Exception | None]] = [(None, None)]
        if self.is_first:
            try:
                said = [(function(), None)]
            except (MoEError, OSError) as error:
                said = [(None, error)]
        dist.broadcast_object_list(said)
        result, failure = said[0]
        if failure is not None:
            raise failure
        return result

    def require_same(self, settings: Mapping[str, str]) -> None:
        """Compare settings over all ranks.

        Raises:
            ConfigError: on every rank, where one differs; names it.
        """
        require_same_everywhere(settings, dist.distributed_c10d._get_default_group())

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        count = torch.tensor(int(flag))
        dist.all_reduce(count)
        return bool(count)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks, the same bits on each."""
        return add_up(values) / self.size

    def same(self, values: Tensor) -> Tensor:
        """The first rank's values, in place."""
        dist.broadcast(values, 0)
        return values


def add_up(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over the ranks of a group, all of them by default; a tensor of its own."""
    total = values.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def merge(values: Mapping[str, Any], group: dist.ProcessGroup) -> dict[str, Any]:
    """What the ranks of a group have by name, together; of equal names the first rank's."""
    theirs: list[Mapping[str, Any]] = [{}] * group.size()
    dist.all_gather_object(theirs, dict(values), group)
    return {name: value for each in reversed(theirs) for name, value in each.items()}


def hand_on(values: Tensor, source: int, group: dist.ProcessGroup) -> Tensor:
    """The values of one rank of a group, on all of them, in place.

    Args:
        values: of the same shape and dtype on all.
        source: its number in the group.
        group: the ranks.
    """
    if values.numel():
        dist.broadcast(values, group=group, group_src=source)
    return values
