"""Runs commands some at a time, each in a process of its own, so that one that fails takes no other with it."""

import subprocess
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen


def run_all(
    commands: Mapping[str, Sequence[str]], at_once: int, environment: Mapping[str, str], logs: Path
) -> Generator[tuple[str, int], None, None]:
    """Run commands; where this is interrupted or closed, those that run are ended first.

    Args:
        commands: by name, in the order in which they start.
        at_once: how many.
        environment: of each.
        logs: an existing folder; the output of a command goes to ``<name>.log``.

    Yields:
        A command's name and exit status, once it has ended.
    """
    waiting, running = list(commands), dict[str, Popen[bytes]]()
    with _ended(running):
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                with (logs / f"{name}.log").open("wb") as log:
                    running[name] = Popen(
                        list(commands[name]),
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                    )
            done = [name for name, process in running.items() if process.poll() is not None]
            for name in done:
                yield name, running.pop(name).returncode
            if not done:
                time.sleep(0.05)


@contextmanager
def _ended(running: Mapping[str, Popen[bytes]]) -> Iterator[None]:
    """Leave no process behind. A terminal's Ctrl-C has reached them too; SIGTERM asks those that it has not."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
