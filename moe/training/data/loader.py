"""Batches of token windows from a memory map.

Sizes: L tokens of a split, B windows a batch, S predictions a window (``seq_len``). A window is S + 1 tokens, of which
the first S are inputs and the last S are targets.
"""

from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Int64, Integer
from torch import Tensor

from moe.errors import CheckpointError, ConfigError, DataError
from moe.training.data.permutation import Permutation, draw


class Batch(TypedDict):
    """Windows side by side."""

    inputs: Int64[Tensor, "B S"]
    """What the model sees."""

    targets: Int64[Tensor, "B S"]
    """What comes next, at each place."""


class WindowLoader:
    """Endless batches of windows in a shuffled order that can be taken up again anywhere.

    An epoch is every window of a cut into windows that do not overlap (but for the last target, which is the next
    one's first input), in a random order. Each epoch is cut at another random offset, so that the tokens at the borders
    differ. A batch that an epoch cannot fill goes on in the next one.

    Args:
        tokens: ``(L,)`` ids; a memory map is read only where a window is.
        seq_len: S.
        batch_size: B.
        seed: of offsets and orders; any integer.
        fingerprint: of the corpus, to tell another one in `load_state_dict`.

    Raises:
        ConfigError: seq_len or batch_size is not positive.
        DataError: the tokens are fewer than one window.
    """

    def __init__(
        self, tokens: Integer[np.ndarray, " L"], seq_len: int, batch_size: int, seed: int, fingerprint: str = ""
    ) -> None:
        _check_sizes(tokens, seq_len, batch_size)
        self._tokens = tokens
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._identity = {"seed": seed, "seq_len": seq_len, "num_tokens": len(tokens), "fingerprint": fingerprint}
        self._enter(epoch=0, index=0)

    @property
    def epoch(self) -> int:
        """Epoch of the next batch's first window, from 0."""
        return self._epoch

    @property
    def windows_in_epoch(self) -> int:
        """Windows in this epoch; the offset can make it one fewer in another."""
        return self._order.size

    def next_batch(self) -> Batch:
        """The next batch.

        Returns:
            ``inputs`` and ``targets``, each ``(B, S)`` int64 on the CPU, in memory of their own.
        """
        starts: list[int] = []
        while len(starts) < self._batch_size:
            taken = min(self._batch_size - len(starts), self._order.size - self._index)
            windows = self._order(np.arange(self._index, self._index + taken))
            starts += (self._offset + windows * self._seq_len).tolist()
            self._index += taken
            if self._index == self._order.size:
                self._enter(self._epoch + 1, index=0)
        return _read_windows(self._tokens, starts, self._seq_len)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; plain numbers and strings."""
        return {**self._identity, "epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; the batches from here on are those that followed it.

        Args:
            state: what `state_dict` gave. Another batch_size is allowed: no window is lost or repeated.

        Raises:
            CheckpointError: the state is of another corpus, seq_len or seed, or is no position.
        """
        for name, here in self._identity.items():
            if state.get(name) != here:
                raise CheckpointError(
                    f"the loader's state has {name}={state.get(name)!r}, but here {name}={here!r}: "
                    "a position is of use only in the same tokens, cut and shuffled in the same way"
                )
        epoch, index = state.get("epoch"), state.get("index")
        if not (isinstance(epoch, int) and isinstance(index, int) and epoch >= 0):
            raise CheckpointError(f"the loader's state has epoch={epoch!r} and index={index!r}, not a position")
        offset, order = self._cut(epoch)
        if not 0 <= index < order.size:
            raise CheckpointError(f"the loader's state has index={index}, but epoch {epoch} has {order.size} windows")
        self._epoch, self._index, self._offset, self._order = epoch, index, offset, order

    def _enter(self, epoch: int, index: int) -> None:
        self._epoch, self._index = epoch, index
        self._offset, self._order = self._cut(epoch)

    def _cut(self, epoch: int) -> tuple[int, Permutation]:
        """Where an epoch's first window starts, and the order of its windows."""
        spare = len(self._tokens) - 1 - self._seq_len  # one window has to be left
        offset = int(draw(1, self._seed, epoch, "offset")[0]) % min(self._seq_len, spare + 1)
        return offset, Permutation((len(self._tokens) - 1 - offset) // self._seq_len, self._seed, epoch)


def eval_batches(
    tokens: Integer[np.ndarray, " L"], seq_len: int, batch_size: int, max_windows: int | None = None
) -> Iterator[Batch]:
    """The same windows each time, evenly spaced over the tokens, without overlap between targets.

    Args:
        tokens: ``(L,)`` ids.
        seq_len: S.
        batch_size: B; the last batch may have fewer.
        max_windows: how many windows at most, None for all.

    Returns:
        Iterator over the batches, see `Batch`.

    Raises:
        ConfigError: a size is not positive.
        DataError: the tokens are fewer than one window.
    """
    _check_sizes(tokens, seq_len, batch_size)
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows={max_windows} is not positive")
    available = (len(tokens) - 1) // seq_len
    count = available if max_windows is None else min(max_windows, available)
    starts = [index * available // count * seq_len for index in range(count)]
    return (_read_windows(tokens, starts[at : at + batch_size], seq_len) for at in range(0, count, batch_size))


def target_bytes(targets: Int64[Tensor, "B S"], token_bytes: Integer[np.ndarray, " V"]) -> int:
    """How many bytes of text targets stand for, which is what their loss is divided by.

    Args:
        targets: ``(B, S)`` ids.
        token_bytes: ``(V,)`` bytes of each id, 0 for the separator: a separator's loss counts, its bytes do not.

    Returns:
        Bytes. The bits per byte of a model are its summed loss in nats / log(2) / these.
    """
    return int(token_bytes[targets.cpu().numpy()].sum())


def _check_sizes(tokens: np.ndarray, seq_len: int, batch_size: int) -> None:
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value} is not positive")
    if len(tokens) <= seq_len:
        raise DataError(
            f"the split has {len(tokens)} tokens, fewer than the {seq_len + 1} that seq_len={seq_len} takes"
        )


def _read_windows(tokens: np.ndarray, starts: list[int], seq_len: int) -> Batch:
    """Copy windows out of the tokens, and nothing else."""
    inputs = np.empty((len(starts), seq_len), dtype=np.int64)
    targets = np.empty_like(inputs)
    for row, start in enumerate(starts):
        window = tokens[start : start + seq_len + 1]
        inputs[row], targets[row] = window[:-1], window[1:]
    return {"inputs": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}
