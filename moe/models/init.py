"""How a decoder's weights start.

* The embedding: normal of deviation sqrt(2 / (5 dim)).
* Every matrix, dense or an expert's: `moe.init.fan_in_normal_` with scale 2/5, so a deviation of sqrt(2 / (5 fan_in)).
* Those among them that write to the residual stream (attention's ``out``, the feed-forwards' ``down``): that divided by
  sqrt(2 * num_layers), since as many branches add up in it.
* Routers, a shared expert's gate and biases: as `moe.MoE` draws them.

So experts do not keep the scale 1/10 that `moe.MoE` gives them by itself: with 2/5 a small decoder learns faster from
the start, and a dense and an MoE decoder differ in nothing but their layers.

Source: Nguyen & Salazar 2019, arXiv 1910.05895 (2/5, their SmallInit), as GPT-NeoX-20B used it (Black et al. 2022,
arXiv 2204.06745, "Initialization"); GPT-2 (Radford et al. 2019, section 2.3) for the division.
"""

import math

from torch import Tensor, nn

from moe.experts import FeedForward
from moe.init import fan_in_normal_
from moe.layer import MoE
from moe.models.block import Block

SCALE = 2 / 5
"""Variance times fan-in."""


def init_embedding(embedding: nn.Embedding) -> None:
    """Draw an embedding's weight anew; tied to the output, it gives logits of a deviation below 1."""
    nn.init.normal_(embedding.weight, std=math.sqrt(SCALE / embedding.embedding_dim))


def init_head(head: nn.Linear) -> None:
    """Draw an output projection's weight anew."""
    fan_in_normal_(head.weight, head.in_features, SCALE)


def init_block(block: Block, num_layers: int) -> None:
    """Draw a block's weights anew."""
    block.attention_norm.reset_parameters()
    block.ffn_norm.reset_parameters()
    readers: list[Tensor] = [block.attention.qkv.weight]
    writers: list[Tensor] = [block.attention.out.weight]
    dense: FeedForward | None
    if isinstance(block.ffn, MoE):
        block.ffn.router.reset_parameters()
        block.ffn.balancer.reset_parameters()
        block.ffn.experts.reset_parameters()
        readers.append(block.ffn.experts.up_weight)
        writers.append(block.ffn.experts.down_weight)
        dense = block.ffn.shared
    else:
        dense = block.ffn
    if dense is not None:
        dense.reset_parameters()
        readers.append(dense.up.weight)
        writers.append(dense.down.weight)
    for weight in readers:
        fan_in_normal_(weight, weight.shape[-1], SCALE)
    for weight in writers:
        fan_in_normal_(weight, weight.shape[-1], SCALE / (2 * num_layers))
