"""How a decoder's weights start."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moe.init import fan_in_normal_
from moe.layer import MoE
from moe.models.block import Block

EMBEDDING_STD = 0.02
"""Of the token embedding, and so of a tied output projection. Source: GPT-2's released code."""


def init_block(block: Block, num_layers: int) -> None:
    """Draw a block's weights anew.

    Every matrix, dense or an expert's, follows `moe.init.fan_in_normal_`. Those that write to the residual stream are
    then divided by sqrt(2 * num_layers), since as many branches add up in it.

    Source: GPT-2 (Radford et al. 2019, section 2.3) for the division.
    """
    for norm in (block.attention_norm, block.ffn_norm):
        norm.reset_parameters()
    for linear in (block.attention.qkv, block.attention.out):
        fan_in_normal_(linear.weight, linear.in_features)
    parts = (block.ffn.router, block.ffn.experts, block.ffn.shared) if isinstance(block.ffn, MoE) else (block.ffn,)
    for part in parts:
        if part is not None:
            part.reset_parameters()
    with torch.no_grad():
        for weight in residual_outputs(block):
            weight.div_(math.sqrt(2 * num_layers))


def residual_outputs(block: Block) -> Iterator[Tensor]:
    """The weights whose products are added to the residual stream."""
    yield block.attention.out.weight
    if not isinstance(block.ffn, MoE):
        yield block.ffn.down.weight
        return
    yield block.ffn.experts.down_weight
    if block.ffn.shared is not None:
        yield block.ffn.shared.down.weight
