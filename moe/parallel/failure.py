"""Who is missing when a collective fails: a rank that is gone, or that does not answer, by its number.

A collective says that a connection broke or that time is up, not whose fault it is. So every rank whose collective
failed writes a key into the store of the process group; who has written one is well. Of the others, one whose process
has ended is known at once: every rank listens on a port that nobody uses, and the kernel closes it with the process.
One that is stuck still has its port, and is named when it has not written its key in time.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import final

import torch.distributed as dist

from moe.errors import MoEError, ParallelError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
"""Seconds between two looks at the others."""


@final
@dataclass(frozen=True)
class Seat:
    """Where a rank runs."""

    host: str
    pid: int
    address: str
    port: int

    def is_reachable_from(self, other: "Seat") -> bool:
        """Whether a refused connection says anything: an address of the host itself means another host elsewhere."""
        return self.host == other.host or not self.address.startswith("127.")


@final
class RollCall:
    """Finds out which ranks are missing. Making one is collective.

    Args:
        timeout: seconds that a rank which is stuck is given to answer.
        clock: seconds from any origin.
        pause: waits some seconds.
    """

    def __init__(
        self,
        timeout: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._timeout, self._clock, self._pause = timeout, clock, pause
        address = _own_address()
        self._port = socket.create_server((address, 0), family=_family(address))
        own = Seat(socket.gethostname(), os.getpid(), address, self._port.getsockname()[1])
        self.rank = dist.get_rank()
        self.seats: list[Seat] = [own] * dist.get_world_size()
        dist.all_gather_object(self.seats, own)
        self._store = dist.PrefixStore("moe/roll_call", dist.distributed_c10d._get_default_store())
        self._lines: dict[int, socket.socket] = {}

    def explain(self, error: Exception) -> ParallelError:
        """Say who is missing after a collective has failed with ``error``; waits for those who may yet answer."""
        missing = self._missing()
        reason = str(error).strip().splitlines()[0]
        if not missing:
            return ParallelError(
                f"a collective failed though all ranks answer, so that some took too long or called another one: "
                f"{reason}"
            )
        names = ", ".join(self._name(rank, is_gone) for rank, is_gone in missing.items())
        return ParallelError(f"{names}; seen by rank {self.rank}, whose collective failed: {reason}")

    def close(self) -> None:
        """Give the port back."""
        for line in (*self._lines.values(), self._port):
            line.close()

    def _name(self, rank: int, is_gone: bool) -> str:
        seat = self.seats[rank]
        what = "is gone, its process has ended" if is_gone else f"does not answer within {self._timeout:g} seconds"
        return f"rank {rank} (process {seat.pid} on {seat.host}) {what}"

    def _missing(self) -> dict[int, bool]:
        """The ranks that are missing, and whether their process is known to have ended."""
        with suppress(RuntimeError):  # the store has died with the process that kept it
            self._store.set(str(self.rank), "well")
        deadline, pause = self._clock() + self._timeout, _FIRST_PAUSE
        while silent := self._silent(range(len(self.seats))):
            ended = [rank for rank in silent if self._is_gone(rank)]
            gone = self._silent(ended)  # asked again: one that ended after it had answered is another's victim
            if gone:
                return dict.fromkeys(gone, True)
            if self._clock() > deadline:
                return dict.fromkeys(silent, False)
            self._pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return {}

    def _silent(self, ranks: "range | list[int]") -> list[int]:
        """Those that have not answered."""
        try:
            return [rank for rank in ranks if rank != self.rank and not self._store.check([str(rank)])]
        except RuntimeError:
            return [rank for rank in ranks if rank != self.rank]

    def _is_gone(self, rank: int) -> bool:
        """Whether a rank's process has ended for certain; False where nothing can be known."""
        seat = self.seats[rank]
        if not seat.is_reachable_from(self.seats[self.rank]):
            return False
        try:
            if rank not in self._lines:
                self._lines[rank] = socket.create_connection((seat.address, seat.port), timeout=1)
                self._lines[rank].setblocking(False)
            return self._lines[rank].recv(1) == b""
        except ConnectionError:  # refused, or reset when the process ended
            return True
        except OSError:  # nothing to read, which is right; or a host that cannot be reached
            return False


def is_collective_failure(error: BaseException) -> bool:
    """Whether an error came from the communication between ranks, rather than from a rank's own work."""
    if isinstance(error, MoEError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))


def _own_address() -> str:
    """This machine's, on the network on which the ranks met."""
    meeting = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        family, *_, place = socket.getaddrinfo(meeting, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as line:  # sends nothing; it only asks for the route
            line.connect(place)
            return str(line.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
