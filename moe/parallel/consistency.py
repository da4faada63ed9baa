"""Ranks that were started with different settings find out before the first step."""

import hashlib
from collections.abc import Mapping

import torch.distributed as dist

from moe.errors import ConfigError


def require_same_everywhere(settings: Mapping[str, str]) -> None:
    """Compare settings over all ranks.

    Args:
        settings: by what they are called in the error.

    Raises:
        ConfigError: on every rank, where one differs; names the setting and the ranks that differ from rank 0.
    """
    own = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in settings.items()}
    everywhere: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, own)
    for name in everywhere[0]:
        differing = [rank for rank, theirs in enumerate(everywhere) if theirs.get(name) != everywhere[0][name]]
        if differing:
            raise ConfigError(
                f"ranks differ in {name}: {', '.join(map(str, differing))} from rank 0; this is rank "
                f"{dist.get_rank()} with {settings.get(name, '')[:2000]}"
            )
