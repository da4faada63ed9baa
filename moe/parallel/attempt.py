"""A store for one attempt of a run: torchrun keeps its own over restarts, addresses of dead processes and all.

Every rank says hello under a name of its own making, and the first rank answers each name with the attempt's. An answer
to a hello of an earlier attempt is read by nobody. See https://github.com/pytorch/pytorch/issues/135712.
"""

import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from moe.errors import ParallelError

_PAUSE = 0.05
"""Seconds between two looks at who has come."""


def store_of_attempt(timeout: float) -> tuple[dist.Store, int, int]:
    """Meet the other processes that the environment tells of.

    Args:
        timeout: seconds to wait for them.

    Returns:
        A store that holds nothing yet, this process's rank, and how many there are.

    Raises:
        ParallelError: some do not come.
    """
    shared, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    shared.set_timeout(timedelta(seconds=timeout))
    store = dist.PrefixStore("moe/attempt", shared)
    if rank == 0:
        name = secrets.token_hex(8)
        welcome(store, name, size, timeout)
    else:
        name = greet(store, rank)
    return dist.PrefixStore(f"moe/attempt/{name}", shared), rank, size


def welcome(store: dist.Store, attempt: str, size: int, timeout: float) -> None:
    """Tell every other rank the attempt's name; the first rank's part.

    Raises:
        ParallelError: some have not come in time.
    """
    deadline = time.monotonic() + timeout
    waiting = set(range(1, size))
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"hello/{rank}"]):
                store.set(f"welcome/{rank}/{store.get(f'hello/{rank}').decode()}", attempt)
        waiting = {rank for rank in waiting if not store.check([f"here/{attempt}/{rank}"])}
        if waiting and time.monotonic() > deadline:
            missing = ", ".join(map(str, sorted(waiting)))
            raise ParallelError(f"ranks {missing} of {size} have not come within {timeout:g} seconds")
        if waiting:
            time.sleep(_PAUSE)


def greet(store: dist.Store, rank: int) -> str:
    """Ask for the attempt's name; every other rank's part."""
    own = secrets.token_hex(8)
    store.set(f"hello/{rank}", own)
    attempt: str = store.get(f"welcome/{rank}/{own}").decode()  # waits
    store.set(f"here/{attempt}/{rank}", "")
    return attempt
