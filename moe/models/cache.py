"""Keys and values of the tokens a decoder has seen, so that each is computed once."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moe.errors import ShapeError
from moe.models.config import DecoderConfig


@final
class LayerCache:
    """One layer's part of a `KVCache`."""

    def __init__(
        self, keys: Float[Tensor, "B max_length Hkv head_dim"], values: Float[Tensor, "B max_length Hkv head_dim"]
    ):
        self._keys = keys
        self._values = values
        self.length = 0

    def append(
        self, keys: Float[Tensor, "B S Hkv head_dim"], values: Float[Tensor, "B S Hkv head_dim"]
    ) -> tuple[Float[Tensor, "B length Hkv head_dim"], Float[Tensor, "B length Hkv head_dim"]]:
        """Write the keys and values of S new tokens and return those of all tokens so far, as views."""
        end = self.length + keys.shape[1]
        self._keys[:, self.length : end] = keys
        self._values[:, self.length : end] = values
        self.length = end
        return self._keys[:, :end], self._values[:, :end]


@final
class KVCache:
    """Room for the keys and values of ``max_length`` tokens in every layer, allocated once.

    Args:
        config: of the model that fills it.
        batch_size: B.
        max_length: tokens a sequence, prompt and new ones together.
        device: where the model is.
        dtype: of the model.

    Raises:
        ShapeError: ``max_length`` exceeds what the model accepts.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not 1 <= max_length <= config.max_seq_len:
            raise ShapeError(f"max_length={max_length} is outside 1 .. max_seq_len={config.max_seq_len}")
        self.batch_size = batch_size
        self.max_length = max_length
        shape = (2, config.num_layers, batch_size, max_length, config.num_kv_heads, config.head_dim)
        keys, values = torch.empty(shape, device=device, dtype=dtype)
        self.layers = [LayerCache(k, v) for k, v in zip(keys, values)]

    @property
    def length(self) -> int:
        """How many tokens are in it."""
        return self.layers[0].length
