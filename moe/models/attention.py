"""Grouped-query attention with rotary positions."""

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.models.cache import LayerCache
from moe.models.config import DecoderConfig
from moe.models.rotary import rotate


@final
class Attention(nn.Module):
    """Causal self-attention; groups of query heads share a key and a value head.

    Queries, keys and values come from one product, in this order along the output of ``qkv``. Some of the heads, with
    their rows of ``qkv`` and columns of ``out``, are an `Attention` too, of which ``heads`` says how many.

    Source: Ainslie et al. 2023, arXiv:2305.13245, section 2.2 (grouped-query attention).
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.num_kv_heads = config.num_kv_heads
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.qkv = nn.Linear(config.dim, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        cos: Float[Tensor, "S 1 head_dim"],
        sin: Float[Tensor, "S 1 head_dim"],
        mask: Bool[Tensor, "#B 1 S length"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Mix each token with those before it.

        Args:
            x: ``(B, S, D)``.
            cos: ``(S, 1, head_dim)`` from `rotary_tables`, of the S tokens' positions.
            sin: ``(S, 1, head_dim)``, likewise.
            mask: from `attention_mask`, with the same cache.
            cache: this layer's keys and values of earlier tokens; those of ``x`` are appended.

        Returns:
            ``(B, S, D)``.
        """
        num_heads, num_kv_heads, _ = self.heads
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        queries_and_keys, values = qkv.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
        queries, keys = rotate(queries_and_keys, cos, sin).split((num_heads, num_kv_heads), dim=2)
        if cache is not None:
            keys, values = self._append(cache, keys, values)
        mixed = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and x.shape[1] > 1,
            enable_gqa=num_heads != num_kv_heads,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _append(self, cache: LayerCache, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far; the cache has room for all heads of the model, be they here or not."""
        here = keys.shape[2]
        elsewhere = self.num_kv_heads - here
        if elsewhere:
            keys, values = (F.pad(each, (0, 0, 0, elsewhere)) for each in (keys, values))
        keys, values = cache.append(keys, values)
        return keys[:, :, :here], values[:, :, :here]


def attention_mask(
    num_tokens: int, num_past: int, token_mask: Bool[Tensor, "B S"] | None, device: torch.device
) -> Bool[Tensor, "#B 1 S length"] | None:
    """Which keys each query may look at, or None where the kernel's own causal mask (or no mask) says the same.

    A padded token looks at itself although it is padding: a row without any key would be NaN, and NaN, once in the
    values of the next layer, reaches every token whatever its weight.

    Args:
        num_tokens: S, new tokens a sequence.
        num_past: tokens before them, in a cache.
        token_mask: ``(B, S)``, True for real tokens; not beside a cache that holds tokens.
        device: where the mask is made.

    Returns:
        ``(1 or B, 1, S, num_past + S)`` bool, True where a query looks at a key; or None.
    """
    if token_mask is None and (num_past == 0 or num_tokens == 1):
        return None
    causal = torch.ones(num_tokens, num_past + num_tokens, dtype=torch.bool, device=device).tril(num_past)
    if token_mask is None:
        return causal[None, None]
    itself = torch.eye(num_tokens, dtype=torch.bool, device=device)
    return ((causal & token_mask[:, None, :]) | itself)[:, None]
