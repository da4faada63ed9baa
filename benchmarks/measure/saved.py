"""The bytes that a forward pass keeps for its backward pass, by asking autograd."""

from collections.abc import Callable, Iterable

import torch
from peers.contestant import Layer
from torch import Tensor


def saved_bytes(run: Callable[[], Tensor], given: Iterable[Tensor]) -> int:
    """Sum the storages that autograd keeps.

    A storage counts once, and whole: a view keeps all of it alive. What a function stows away past
    ``save_for_backward`` is not seen; ``mode=memory`` weighs the process instead.

    Args:
        run: a forward pass.
        given: tensors that exist anyway, parameters and input, which are not counted.
    """
    ours = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # held, so that no other storage gets its address
        kept.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    del y
    return sum(storage.nbytes() for address, storage in kept.items() if address not in ours)


def saved_by(layer: Layer) -> int:
    """What a contestant's forward pass keeps besides its parameters, its buffers and its input."""
    layer.ready(training=True)
    return saved_bytes(lambda: layer.run(layer.x), [layer.x, *layer.module.parameters(), *layer.module.buffers()])
