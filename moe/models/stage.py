"""A decoder cut into consecutive parts, as pipeline parallelism needs them."""

from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.models.attention import attention_mask
from moe.models.block import run_block
from moe.models.decoder import Decoder
from moe.models.rotary import rotary_tables


@final
class DecoderStage(nn.Module):
    """Some consecutive blocks of a decoder; the first stage has the embedding, the last one norm and head.

    Parameters have the names that they have in the whole model, so that stages together are a checkpoint of it.

    Args:
        decoder: whose modules these become.
        layers: which blocks.

    Raises:
        ConfigError: the decoder's head is its embedding, which would be on two stages at once.
    """

    def __init__(self, decoder: Decoder, layers: range) -> None:
        super().__init__()
        if decoder.head is None:
            raise ConfigError("tie_embeddings=True puts one weight on the first and the last stage; set it to False")
        self.config, self.activation_checkpointing = decoder.config, decoder.activation_checkpointing
        is_last = layers.stop == decoder.config.num_layers
        self.embedding = decoder.embedding if layers.start == 0 else None
        self.blocks = nn.ModuleDict({str(layer): decoder.blocks[layer] for layer in layers})
        self.norm = decoder.norm if is_last else None
        self.head = decoder.head if is_last else None

    def forward(
        self, x: Int[Tensor, "B S"] | Float[Tensor, "B S D"], token_mask: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S W"]:
        """What :meth:`moe.models.Decoder.forward` does, this stage's part of it.

        Args:
            x: token ids into the first stage, else the activations of the stage before.
            token_mask: of the tokens, the same for every stage; True for real ones.

        Returns:
            ``(B, S, D)``, or of the last stage logits ``(B, S, V)``, float32 at least.
        """
        ids = None
        if self.embedding is not None:
            x, ids = self.embedding(x), x
        positions = torch.arange(x.shape[1], device=x.device)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        mask = attention_mask(x.shape[1], 0, token_mask, x.device)
        for block in self.blocks.values():
            x = run_block(block, self.activation_checkpointing, x, cos, sin, mask, token_mask, None, ids)
        if self.norm is None or self.head is None:
            return x
        logits = F.linear(self.norm(x), self.head.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def split_decoder(decoder: Decoder, num_stages: int) -> list[DecoderStage]:
    """All stages of a decoder, with as equal numbers of blocks as there can be.

    Raises:
        ConfigError: fewer blocks than stages, or tied embeddings.
    """
    num_layers = decoder.config.num_layers
    if num_stages > num_layers:
        raise ConfigError(f"{num_stages} pipeline stages are more than num_layers={num_layers}")
    bounds = [num_layers * stage // num_stages for stage in range(num_stages + 1)]
    return [DecoderStage(decoder, range(first, end)) for first, end in pairwise(bounds)]
