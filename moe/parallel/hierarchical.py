"""Experts on other nodes: each token crosses to a node once, and spreads out only there.

Example, two nodes with ranks 0-1 and 2-3, expert e on rank e. A token of rank 0 that chose experts 2 and 3 goes once
from rank 0 to rank 2, its counterpart on the other node, and from there to ranks 2 and 3; on the way back rank 2 adds
up what both made of it. Dispatched at once it would cross twice. Where the links between nodes are the slow ones this
is worth the second hop; a router with ``num_groups`` limits how many nodes a token reaches.

Source: DeepSeek-V3 (arXiv 2412.19437), section 3.2.2, which does the same in its own kernels.
"""

from dataclasses import dataclass
from typing import final

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from moe.dispatch import Experts
from moe.parallel.dispatcher import ExpertParallel
from moe.types import Routing


@final
@dataclass(frozen=True)
class Hierarchical:
    """One dispatcher inside another: between counterparts of all nodes, then within the node.

    Attributes:
        across: to whom a node is one rank that holds all of its experts.
        within: the ranks of this node.
    """

    across: ExpertParallel
    within: ExpertParallel

    @classmethod
    def split(cls, flat: ExpertParallel, across: dist.ProcessGroup, within: dist.ProcessGroup) -> "Hierarchical":
        """What does the same as a dispatcher over all ranks.

        Args:
            flat: its ranks stand node by node.
            across: those of them that have the same place on their nodes.
            within: those of this node.
        """
        holders = within.size() // flat.copies
        nodes = flat.bounds[::holders]
        first = nodes[across.rank()]
        own = flat.bounds[across.rank() * holders :][: holders + 1]
        chunks, limit = flat.chunks, flat.max_received_tokens
        return cls(
            ExpertParallel(across, nodes, chunks=chunks, max_received_tokens=limit, together=flat.group),
            # Rounds between nodes are enough for overlap.
            ExpertParallel(
                within,
                tuple(expert - first for expert in own),
                copies=flat.copies,
                gradient_scale=flat.gradient_scale,
                max_received_tokens=limit,
            ),
        )

    def run(self, experts: Experts, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """The sum of each token's experts, wherever they are."""
        return self.across.run(lambda rows, there: self.within.run(experts, rows, there), x, routing)
