"""One layer of a decoder: attention, then a feed-forward that is dense or a mixture of experts."""

from enum import StrEnum
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.experts import FeedForward
from moe.layer import MoE
from moe.models.attention import Attention
from moe.models.cache import LayerCache
from moe.models.config import DecoderConfig


class ActivationCheckpointing(StrEnum):
    """What a training step keeps of each block for the backward pass."""

    NONE = "none"
    """Everything."""
    REENTRANT = "reentrant"
    """The block's input; backward runs the block again inside an autograd function of its own. Gradients reach a
    block's weights only if its input needs a gradient, so the embedding must not be frozen."""
    NONREENTRANT = "nonreentrant"
    """The block's input; backward runs the block again when a saved tensor is asked for. PyTorch's own choice."""


@final
class Block(nn.Module):
    """A pre-norm residual layer; ``ffn`` is a SwiGLU `moe.experts.FeedForward` or a `moe.MoE`.

    `torch.nn.RMSNorm` takes its mean square in float32 at least.

    Source: Xiong et al. 2020, arXiv 2002.04745 (norm before each branch); Zhang & Sennrich 2019, arXiv 1910.07467
    (RMSNorm).
    """

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn: FeedForward | MoE
        if config.moe is not None and layer in config.moe_layers:
            self.ffn = MoE(dim=config.dim, **config.moe)
        else:
            self.ffn = FeedForward(config.dim, config.ffn_hidden_dim)

    def forward(
        self,
        x: Float[Tensor, "B part D"],
        cos: Float[Tensor, "S 1 head_dim"],
        sin: Float[Tensor, "S 1 head_dim"],
        mask: Bool[Tensor, "#B 1 S length"] | None = None,
        token_mask: Bool[Tensor, "B S"] | None = None,
        cache: LayerCache | None = None,
        token_ids: Int[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B part D"]:
        """Add both branches to the residual stream; arguments as `Attention` and `moe.MoE` take them.

        Under sequence parallelism ``x`` is this rank's part of the S tokens.
        """
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        normed = self.ffn_norm(x)
        return x + (self.ffn(normed, token_mask, token_ids) if isinstance(self.ffn, MoE) else self.ffn(normed))


def run_block(block: nn.Module, checkpointing: ActivationCheckpointing, *args: Any) -> Float[Tensor, "B part D"]:
    """The block's output; under activation checkpointing where there will be a backward pass."""
    if checkpointing is ActivationCheckpointing.NONE or not torch.is_grad_enabled():
        y: Tensor = block(*args)
    else:
        y = checkpoint(block, *args, use_reentrant=checkpointing is ActivationCheckpointing.REENTRANT)
    return y
