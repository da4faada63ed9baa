"""A function in several processes of this machine, with a process group between them: for checks, tests and trials."""

import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException

from moe.errors import ParallelError


def run_local(function: Callable[..., Any], world_size: int, args: Sequence[Any] = (), *, timeout: float = 300) -> list:
    """Run ``function(*args)`` on every rank, one thread each, over gloo.

    Args:
        function: of a module, so that other processes can import it.
        world_size: processes.
        args: the same for all.
        timeout: seconds until a collective that waits for another rank gives up.

    Returns:
        What each rank returned, in their order; moved by ``torch.save``.

    Raises:
        ParallelError: a rank failed; with its traceback. The others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A server that has imported torch once forks all ranks: a tenth of the time of starting each from nothing.
        # torch._dynamo is what the first custom op or checkpoint in a process would import, in 1.4 s.
        multiprocessing.get_context("forkserver").set_forkserver_preload(["moe.parallel.local_ranks", "torch._dynamo"])
        context = multiprocessing.start_processes(
            _rank, (function, world_size, args, folder, timeout), world_size, join=False, start_method="forkserver"
        )
        try:
            while not context.join():
                pass
        except ProcessException as error:
            raise ParallelError(f"rank {error.error_index} of {world_size} failed: {error}") from None
        finally:
            for process in context.processes:
                process.kill()
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int, function: Callable[..., Any], world_size: int, args: Sequence[Any], folder: str, timeout: float
) -> None:
    join_group(rank, world_size, folder, timeout)
    result = function(*args)
    torch.save(result, Path(folder, str(rank)))
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


def join_group(rank: int, world_size: int, folder: str, timeout: float) -> None:
    """Make this process a rank of one thread, over gloo.

    Args:
        rank: its number.
        world_size: of how many.
        folder: where they all meet; of nobody else.
        timeout: seconds until a collective that waits for another rank gives up.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
