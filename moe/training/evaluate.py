"""How well a model predicts text it has not been trained on."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Integer
from torch import nn
from torch.nn import functional as F

from moe.layer import take_evaluation_load
from moe.training.data import Batch, target_bytes


@final
@dataclass(frozen=True)
class Evaluation:
    """What a validation found."""

    loss: float
    """Mean cross entropy, nats per token."""

    bits_per_byte: float
    """Total cross entropy in bits over the bytes of text it predicts, comparable between tokenizers."""

    max_vio: dict[str, float]
    """MaxVio of each MoE layer over the whole validation, in evaluation mode."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    token_bytes: Integer[np.ndarray, " V"],
    device: torch.device,
    autocast: AbstractContextManager[None],
) -> Evaluation:
    """Run a model in evaluation mode over batches; the mode it was in is restored.

    Args:
        model: from token ids to logits.
        batches: at least one, see `moe.training.data.eval_batches`.
        token_bytes: bytes of text of each token id.
        device: where the model is.
        autocast: entered around each forward pass.
    """
    was_training = model.training
    model.eval()
    take_evaluation_load(model)  # what was counted before is not this validation's
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_tokens = num_bytes = 0
    for batch in batches:
        with autocast:
            logits = model(batch["inputs"].to(device))
        targets = batch["targets"].to(device)
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").double()
        num_tokens += targets.numel()
        num_bytes += target_bytes(batch["targets"], token_bytes)
    max_vio = {layer: stats.max_vio.item() for layer, stats in take_evaluation_load(model).items()}
    model.train(was_training)
    return Evaluation(total.item() / num_tokens, total.item() / math.log(2) / max(num_bytes, 1), max_vio)
