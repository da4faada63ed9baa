"""This rank's rows of a batch that all ranks have."""

from collections.abc import Mapping

from torch import Tensor

from moe.errors import ShapeError
from moe.parallel.mesh import ParallelMesh


def split_batch(batch: Mapping[str, Tensor], mesh: ParallelMesh) -> dict[str, Tensor]:
    """The part of a batch that this data rank sees; ranks that share tokens see the same.

    Args:
        batch: whole, ``(rows, ...)`` each, the same on all ranks.
        mesh: where this rank stands.

    Returns:
        ``(rows / dp, ...)`` each: views of consecutive rows, the first data rank's first.

    Raises:
        ShapeError: the rows of a tensor do not divide evenly, so that the mean over ranks would not be the mean over
            rows.
    """
    parts = {}
    for name, tensor in batch.items():
        rows, ranks = (tensor.shape[0] if tensor.dim() else 0), mesh.degrees.dp
        if tensor.dim() == 0 or rows % ranks:
            raise ShapeError(
                f"batch[{name!r}] has shape {tuple(tensor.shape)}; its rows must be a multiple of dp_replicate="
                f"{mesh.degrees.dp_replicate} * dp_shard={mesh.degrees.dp_shard} = {ranks}"
            )
        parts[name] = tensor.chunk(ranks)[mesh.data_rank] if rows else tensor
    return parts
