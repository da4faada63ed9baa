"""A decoder language model whose feed-forward layers are dense or mixtures of experts."""

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.config import option
from moe.errors import DtypeError, ShapeError
from moe.layer import MoE
from moe.models.attention import attention_mask
from moe.models.block import ActivationCheckpointing, Block, run_block
from moe.models.cache import KVCache
from moe.models.config import DecoderConfig
from moe.models.init import init_block, init_embedding, init_head
from moe.models.rotary import rotary_tables


@final
class Decoder(nn.Module):
    """A causal language model: embedding, pre-norm blocks of attention and feed-forward, norm, output projection.

    Its MoE layers are ``blocks.<i>.ffn``; add ``moe.balance_loss(model)`` to the training loss.

    Args:
        config: the architecture.
        activation_checkpointing: a member of `ActivationCheckpointing`; blocks are the unit.

    Raises:
        ConfigError: ``activation_checkpointing`` is unknown, or ``config.moe`` has a value that `moe.MoE` refuses.
    """

    def __init__(self, config: DecoderConfig, *, activation_checkpointing: str = "none"):
        super().__init__()
        self.config = config
        self.activation_checkpointing = option(
            ActivationCheckpointing, "activation_checkpointing", activation_checkpointing
        )
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights anew, as after building on the meta device; see `moe.models.init`."""
        init_embedding(self.embedding)
        if self.head is not None:
            init_head(self.head)
        self.norm.reset_parameters()
        for module in self.modules():
            if isinstance(module, Block):
                init_block(module, self.config.num_layers)

    def forward(
        self,
        tokens: Int[Tensor, "B S"],
        *,
        token_mask: Bool[Tensor, "B S"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B S V"]:
        """Score what comes after each token.

        Args:
            tokens: ``(B, S)`` int32 or int64, values in 0 .. V - 1.
            token_mask: ``(B, S)`` bool, True for real tokens. Padding may stand anywhere; no real token looks at it
                and no expert gets it. The logits at padding mean nothing.
            cache: keys and values of the tokens before these; those of ``tokens`` are added. Without gradients only.

        Returns:
            ``(B, S, V)`` logits, float32 whatever the model's dtype or autocast (float64 in a float64 model).

        Raises:
            ShapeError: ``tokens`` has not two dimensions, is longer than ``max_seq_len`` or than the room left in the
                cache; ``token_mask`` has another shape, or stands beside a cache.
            DtypeError: ``tokens`` is not integer or ``token_mask`` not bool.
        """
        check_inputs(self.config, tokens, token_mask, cache)
        num_past = 0 if cache is None else cache.length
        positions = torch.arange(num_past, num_past + tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        mask = attention_mask(tokens.shape[1], num_past, token_mask, tokens.device)
        for layer, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[layer]
            x = run_block(block, self.activation_checkpointing, x, cos, sin, mask, token_mask, layer_cache, tokens)
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(self.norm(x), weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def num_parameters(self) -> int:
        """How many numbers the model learns; a tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """How many of them take part in one token's forward pass: all but the experts a token is not sent to.

        Of E routed experts ``top_k`` count (the most a router sends a token to); shared experts, router, embedding
        and output projection count whole. Two models are equally active if these numbers are equal.
        """
        idle = 0
        for module in self.modules():
            if isinstance(module, MoE):
                routed = sum(parameter.numel() for parameter in module.experts.parameters())
                idle += routed // module.num_experts * (module.num_experts - module.top_k)
        return self.num_parameters() - idle


def check_inputs(config: DecoderConfig, tokens: Tensor, token_mask: Tensor | None, cache: KVCache | None) -> None:
    """Raise what `Decoder.forward` documents unless its arguments fit the model and each other."""
    if tokens.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"tokens has dtype {tokens.dtype}; token ids are int32 or int64")
    if tokens.dim() != 2:
        raise ShapeError(f"tokens has shape {tuple(tokens.shape)}; expected (batch, sequence)")
    batch_size, num_tokens = tokens.shape
    if num_tokens > config.max_seq_len:
        raise ShapeError(f"tokens has shape {tuple(tokens.shape)}, longer than max_seq_len={config.max_seq_len}")
    if token_mask is not None:
        if token_mask.dtype != torch.bool:
            raise DtypeError(f"token_mask has dtype {token_mask.dtype}; expected torch.bool, True for real tokens")
        if token_mask.shape != tokens.shape:
            raise ShapeError(f"token_mask has shape {tuple(token_mask.shape)}; tokens has {tuple(tokens.shape)}")
        if cache is not None:
            raise ShapeError("token_mask is given beside a cache, which keeps no record of padding")
    if cache is not None and (batch_size != cache.batch_size or cache.length + num_tokens > cache.max_length):
        raise ShapeError(
            f"tokens has shape {tuple(tokens.shape)}; the cache has room for {cache.batch_size} sequences of "
            f"{cache.max_length - cache.length} more tokens"
        )
