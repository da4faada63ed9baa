"""Faults in data parallelism.

Each function takes what it calls once it has changed something, and returns what it replaces.
"""

from typing import Any

from torch import nn

from moe.layer import moe_layers
from moe.parallel import data_parallel
from moe.verify.planting import Fire, Patch


def router_not_averaged(fire: Fire) -> list[Patch]:
    """FSDP2 leaves out the first router that it comes to, so that each rank keeps its own gradient."""
    original = data_parallel.fully_shard
    left_out: set[nn.Parameter] = set()

    def fully_shard(module: nn.Module, *, ignored_params: set[nn.Parameter], **options: Any) -> Any:
        for _, layer in moe_layers(module):
            if not left_out and options["mesh"].size() > 1:
                fire()
                left_out.add(layer.router.weight)
        return original(module, ignored_params=ignored_params | left_out, **options)

    return [(data_parallel, "fully_shard", fully_shard)]


def summed(fire: Fire) -> list[Patch]:
    """FSDP2 divides by nothing."""
    original = data_parallel.fully_shard

    def fully_shard(module: nn.Module, **options: Any) -> Any:
        fire()
        sharded = original(module, **options)
        sharded.set_gradient_divide_factor(1.0)
        return sharded

    return [(data_parallel, "fully_shard", fully_shard)]
