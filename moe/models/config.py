"""What a decoder is made of, checked before anything is built."""

import inspect
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from moe.config import require_positive
from moe.errors import ConfigError
from moe.layer import MoE

_POSITIVE = (
    *("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_dim", "max_seq_len", "moe_every"),
    *("rope_theta", "norm_eps"),
)


@final
@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The architecture of a `Decoder`.

    Which layers are MoE layers: none without ``moe``; with it, layer ``first_dense`` and every ``moe_every``-th
    layer after it. Of six layers, ``first_dense=1, moe_every=2`` makes 1, 3 and 5 MoE layers; ``first_dense=2``
    alone makes 2, 3, 4 and 5.

    Raises:
        ConfigError: a value is out of its range, or two do not fit each other.
    """

    vocab_size: int
    """V; token ids are 0 .. V - 1."""

    dim: int
    """D, the width of the residual stream."""

    num_layers: int

    num_heads: int
    """Query heads; each is ``dim / num_heads`` wide."""

    num_kv_heads: int
    """Key and value heads; consecutive groups of ``num_heads / num_kv_heads`` query heads share one."""

    ffn_hidden_dim: int
    """Hidden width of the dense layers' feed-forward; an MoE layer's is ``moe["hidden_dim"]``."""

    max_seq_len: int
    """The longest sequence, in tokens, that the model accepts."""

    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""

    norm_eps: float = 1e-5
    """Added to the mean square before its root is taken."""

    tie_embeddings: bool = True
    """Whether the output projection is the embedding's own weight."""

    moe: dict[str, Any] | None = None
    """Keyword arguments of `moe.MoE` but ``dim``, the same for each MoE layer; None makes every layer dense."""

    first_dense: int = 0
    """How many layers at the bottom are dense."""

    moe_every: int = 1
    """One layer in so many is an MoE layer, counted from ``first_dense``."""

    def __post_init__(self) -> None:
        require_positive(**{name: getattr(self, name) for name in _POSITIVE})
        if self.first_dense < 0:
            raise ConfigError(f"first_dense={self.first_dense} must be at least 0")
        if self.dim % self.num_heads:
            raise ConfigError(f"dim={self.dim} is not a multiple of num_heads={self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(
                f"dim={self.dim} over num_heads={self.num_heads} gives heads of {self.head_dim}; "
                "rotary embedding turns pairs and needs an even number"
            )
        if self.moe is not None:
            self._check_moe(self.moe)

    def _check_moe(self, moe: dict[str, Any]) -> None:
        if "dim" in moe:
            raise ConfigError(f"moe has dim={moe['dim']}; an MoE layer's width is the decoder's dim={self.dim}")
        if isinstance(moe.get("router"), nn.Module):
            raise ConfigError(
                f"moe has router={type(moe['router']).__name__}(...), a module, which all MoE layers would share; "
                "give its name, or a mapping of name and options, so that each layer makes its own"
            )
        try:
            inspect.signature(MoE).bind(dim=self.dim, **moe)
        except TypeError as error:
            raise ConfigError(f"moe={moe} does not fit moe.MoE: {error}") from None
        if self.first_dense >= self.num_layers:
            raise ConfigError(
                f"first_dense={self.first_dense} leaves none of num_layers={self.num_layers} for moe={moe}; "
                "moe=None makes every layer dense"
            )

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.dim // self.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The indices of the MoE layers."""
        return () if self.moe is None else tuple(range(self.first_dense, self.num_layers, self.moe_every))
