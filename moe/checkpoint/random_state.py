"""The generators that a training step can draw from without naming one: torch's, numpy's and Python's."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.checkpoint.tree import decode, encode


def encode_random() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take the state of the global generators: torch's of the CPU and of each CUDA device, numpy's, Python's.

    Returns:
        JSON, and the tensors in it.
    """
    version, words, gauss = random.getstate()
    # A copy of numpy's state; its Mersenne twister's words are the only array in it, and the format wants tensors.
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy["state"] = numpy["state"] | {"key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))}
    # Asking for CUDA's generators would start CUDA, and a process that has not started it has not drawn from them.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    state = {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": numpy,
        "python": [version, torch.tensor(words), gauss],
    }
    tensors: dict[str, Tensor] = {}
    return {key: encode(value, key, tensors) for key, value in state.items()}, tensors


def restore_random(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put the global generators into a state that ``encode_random`` took.

    States of CUDA devices that this machine does not have are left out: nothing here can draw from them.
    """
    state = decode(dict(record), tensors)
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda, device)
    words = state["numpy"]["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(state["numpy"] | {"state": state["numpy"]["state"] | {"key": words}})
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
