"""Nested Python values as JSON that gives the same values back, tensors apart.

JSON has neither tuples nor infinities nor tensors. They become objects with one key that starts with ``$``::

    {"betas": (0.9, 0.95), "best": inf, "lr": tensor(0.1)}, path "groups/0"
    {"betas": {"$tuple": [0.9, 0.95]}, "best": {"$float": "inf"}, "lr": {"$tensor": "groups/0/lr"}}
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe.errors import CheckpointError


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a nested value into JSON.

    Args:
        value: None, bool, int, float, str, tensors, and lists, tuples and mappings from str of such.
        path: name of the value, for the tensors in it and for messages.
        tensors: where its tensors are put, under their paths.

    Returns:
        What ``json.dumps`` takes and ``decode`` turns back, in every bit of every float.

    Raises:
        CheckpointError: there is another type in it, or a key that is no str or starts with ``$``.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        assert path not in tensors, path
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, list | tuple):
        items = [encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise CheckpointError(f"{path} has the key {key!r}: keys must be str and not start with $")
        return {key: encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
    kinds = "None, bool, int, float, str, tensors, and lists, tuples and dicts of them"
    raise CheckpointError(f"{path} is a {type(value).__name__}: a checkpoint holds {kinds}")


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo ``encode``.

    Args:
        value: what ``encode`` returned, by way of JSON.
        tensors: what it put apart.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$float": text}:
            return float(text)
        case {"$tensor": path}:
            return tensors[path]
        case {"$tuple": items}:
            return tuple(decode(item, tensors) for item in items)
    return {key: decode(item, tensors) for key, item in value.items()}
