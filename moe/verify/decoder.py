"""Decoder language models as trials: the one that is built in, and those that a file describes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import construct, option
from moe.layer import balance_loss
from moe.models import Decoder, DecoderConfig
from moe.models.block import ActivationCheckpointing
from moe.verify.factory import Batch, Loss, MakeBatch

BUILT_IN: Mapping[str, Any] = {
    "vocab_size": 64,
    "dim": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_dim": 48,
    "max_seq_len": 16,
    "tie_embeddings": False,
    "first_dense": 1,
    "moe": {
        "hidden_dim": 12,
        "num_experts": 5,
        "top_k": 2,
        "bias": True,
        "shared_hidden_dim": 8,
        "balance": {"squared_deviation": {"coefficient": 0.01}, "score_bias": {"rate": 0.001}},
    },
}
"""A dense layer and three with experts, five of them so that they divide by no number of ranks; shared experts, biases,
a balance loss and a selection bias."""
SEQUENCE = 7
IGNORED = -100


@final
@dataclass(frozen=True)
class DecoderFactory:
    """Builds a decoder with random tokens, some of them padding, and the loss of the next token.

    Attributes:
        settings: of ``DecoderConfig``.
        activation_checkpointing: "none", "reentrant" or "nonreentrant", see ``moe.models.Decoder``.

    Raises:
        ConfigError: an unknown kind of checkpointing.
    """

    settings: Mapping[str, Any] = field(default_factory=lambda: dict(BUILT_IN))
    activation_checkpointing: str = "none"

    def __post_init__(self) -> None:
        option(ActivationCheckpointing, "activation_checkpointing", self.activation_checkpointing)

    def __call__(self) -> tuple[nn.Module, MakeBatch, Loss]:
        """The model, its batches and its loss.

        Raises:
            ConfigError: the settings are not those of a decoder.
        """
        config = construct("model", DecoderConfig, self.settings)
        model = Decoder(config, activation_checkpointing=self.activation_checkpointing)
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):  # they start at zero, where a bias that is added twice does not show
                nn.init.normal_(parameter, std=0.1)
        return model, RandomTokens(config.vocab_size, min(SEQUENCE, config.max_seq_len)), next_token_loss


@final
@dataclass(frozen=True)
class RandomTokens:
    """Draws sequences, the first of them with padding at its end."""

    vocab_size: int
    length: int

    def __call__(self, generator: torch.Generator, batch_size: int) -> dict[str, Tensor]:
        """``tokens (B, S)`` and ``targets (B, S)`` int64, ``token_mask (B, S)`` bool."""
        drawn = torch.randint(self.vocab_size, (batch_size, self.length + 1), generator=generator)
        mask = torch.ones(batch_size, self.length, dtype=torch.bool)
        mask[0, -2:] = self.length < 3
        return {"tokens": drawn[:, :-1], "targets": drawn[:, 1:].where(mask, IGNORED), "token_mask": mask}


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the next token, mean over tokens that count, and the balance loss."""
    logits = model(batch["tokens"], token_mask=batch["token_mask"])
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED) + balance_loss(model)
