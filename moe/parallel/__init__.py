"""Over many devices: experts, data, tensors; and what a step needs to stay exact there."""

from moe.parallel.batch import split_batch
from moe.parallel.degrees import Degrees
from moe.parallel.loads import share_counts
from moe.parallel.mesh import ParallelMesh
from moe.parallel.parallelize import Parallel, parallelize

__all__ = ["Degrees", "Parallel", "ParallelMesh", "parallelize", "share_counts", "split_batch"]
