"""A rank that is killed, stuck, or late in the middle of a step: the others end in time and say which one it was."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

import moe
from moe.errors import ConfigError, ParallelError
from moe.parallel import Degrees, ParallelMesh, parallelize
from moe.parallel.attempt import greet, welcome
from moe.parallel.failure import RollCall, Seat, is_collective_failure
from moe.parallel.local_ranks import join_group, run_local
from moe.parallel.world import World, add_up, meet

RANKS, VICTIM, TIMEOUT = 3, 1, 8.0


def on_every_rank(function, folder, timeout=TIMEOUT):
    """Run a function in processes of which one may be lost.

    Returns:
        By rank that was not: the seconds from the loss to its end, and what it said.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe.parallel.local_ranks"])
    processes = [context.Process(target=_rank, args=(rank, function, str(folder), timeout)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        if rank != VICTIM:
            process.join(60)
    if (folder / "lost").exists():
        processes[VICTIM].kill()
    processes[VICTIM].join(60)
    assert all(process.exitcode is not None for process in processes), "a rank hangs"
    said = {rank: (folder / f"said{rank}") for rank in range(RANKS)}
    return {rank: path.read_text().partition("\n")[::2] for rank, path in said.items() if path.exists()}


def _rank(rank, function, folder, timeout):
    join_group(rank, RANKS, folder, timeout / 2)
    lost = Path(folder, "lost")
    try:
        with meet(torch.device("cpu"), timeout) as world:
            function(rank, lost, world)
            words = "nothing happened"
    except ParallelError as error:
        words = str(error)
    seconds = time.monotonic() - float(lost.read_text()) if lost.exists() else 0.0  # the clock is the machine's
    Path(folder, f"said{rank}").write_text(f"{seconds}\n{words}")
    os._exit(0)


def train(rank, lost, world, number):
    """Steps of a layer over all ranks; in the third forward pass, one of them gets a signal."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), moe.MoE(8, 8, 6, 2, balance=()))
    spread = parallelize(model, ParallelMesh(Degrees(dp_shard=RANKS, ep=RANKS)), blocks=[model[1]])
    passes = []

    def hook(*_):
        passes.append(None)
        if len(passes) == 3 and rank == VICTIM:
            lost.write_text(str(time.monotonic()))
            os.kill(os.getpid(), number)

    model[0].register_forward_hook(hook)
    for _ in range(5):
        model(torch.randn(4, 8)).square().mean().backward()
        spread.clip_grad_norm_(1.0)


def killed(rank, lost, world):
    train(rank, lost, world, signal.SIGKILL)


def stopped(rank, lost, world):
    train(rank, lost, world, signal.SIGSTOP)


def in_two_places(rank, _lost, world):
    groups = [dist.new_group(list(range(RANKS))) for _ in range(2)]
    world.limit_groups()  # or this would take half an hour
    add_up(torch.ones(1), groups[rank % 2])


def test_a_killed_rank_is_named_at_once(tmp_path):
    said = on_every_rank(killed, tmp_path, timeout=120.0)
    assert set(said) == {0, 2}
    for seconds, words in said.values():
        assert words.startswith("rank 1 (process ")
        assert "is gone, its process has ended" in words
        assert float(seconds) < 60  # not even one collective's share of the timeout


def test_a_rank_that_is_stuck_is_named_within_the_timeout(tmp_path):
    said = on_every_rank(stopped, tmp_path)
    assert set(said) == {0, 2}
    for seconds, words in said.values():
        assert words.startswith("rank 1 (process ")
        assert "does not answer within 4 seconds" in words
        assert TIMEOUT / 2 < float(seconds) < TIMEOUT + 3  # the machine may be loaded


def test_ranks_that_all_answer_are_not_blamed(tmp_path):
    said = on_every_rank(in_two_places, tmp_path)
    assert set(said) == {0, 1, 2}
    for _, words in said.values():
        assert words.startswith("a collective failed though all ranks answer")


def own_error(_rank):
    raise RuntimeError("shapes cannot be multiplied")


def other_errors():
    world = World(RollCall(1.0), 30.0)
    with pytest.raises(RuntimeError, match="shapes cannot"), world.watching():
        own_error(0)
    with pytest.raises(ConfigError if world.is_first else ParallelError) as found, world.together():
        find_fault(world)
    with pytest.raises(OSError, match="full"):
        world.first(disk_full)
    assert world.first(lambda: "value of the first") == "value of the first"
    assert world.any(world.rank == 1)
    assert not world.any(False)
    assert world.mean(torch.tensor([float(world.rank)])) == 0.5
    return str(found.value)


def find_fault(world):
    if world.is_first:
        raise ConfigError("width=3 is odd")


def disk_full():
    raise OSError("disk full")


def test_a_rank_s_own_error_stays_what_it_is_and_is_told_to_all():
    assert run_local(other_errors, 2) == ["width=3 is odd", "rank 0 cannot go on: ConfigError: width=3 is odd"]


def test_what_counts_as_a_failed_collective():
    assert is_collective_failure(RuntimeError("[..gloo/transport/tcp/pair.cc:5] Connection closed by peer"))
    assert is_collective_failure(dist.DistStoreError("timed out"))
    assert not is_collective_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_collective_failure(ConfigError("gloo"))
    assert not is_collective_failure(ParallelError("rank 1 is gone; seen by rank 0: gloo/transport/tcp"))


def test_ranks_of_a_new_attempt_do_not_take_the_old_one_for_theirs():
    """The store of torchrun outlives a restart: the third rank of the old attempt died before the new one came."""
    store = dist.HashStore()
    store.set("hello/1", "name of a dead process")
    store.set("hello/2", "name of another")
    store.set("welcome/1/name of a dead process", "old attempt")
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(welcome, store, "new attempt", 3, 20.0)
        others = [threads.submit(greet, store, rank) for rank in (1, 2)]
        assert [other.result(20) for other in others] == ["new attempt"] * 2
        first.result(20)


def test_ranks_that_do_not_come_are_named():
    with pytest.raises(ParallelError, match=r"ranks 1, 2 of 3 have not come within 0.1 seconds"):
        welcome(dist.HashStore(), "new attempt", 3, 0.1)


def test_an_address_of_the_machine_itself_says_nothing_elsewhere():
    here, there = Seat("a", 1, "127.0.1.1", 5), Seat("b", 1, "10.0.0.2", 5)
    assert here.is_reachable_from(Seat("a", 2, "10.0.0.1", 6))
    assert not here.is_reachable_from(there)
    assert there.is_reachable_from(here)
