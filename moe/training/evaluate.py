"""How well a model predicts text it has not been trained on."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Integer

from moe.layer import take_evaluation_load
from moe.monitor import LoadStats
from moe.training.data import Batch, target_bytes
from moe.training.runner import Runner


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

    loads: dict[str, LoadStats]
    """The load that it is the MaxVio of, on the device; of a pipeline, that of the layers in this process."""


@torch.no_grad()
def evaluate(
    runner: Runner,
    batches: Iterable[Batch],
    token_bytes: Integer[np.ndarray, " V"],
    device: torch.device,
    autocast: AbstractContextManager[None],
) -> Evaluation:
    """Run a model in evaluation mode over batches; the mode it was in is restored.

    Args:
        runner: has the model; `moe.training.runner.OneDevice` of any module from token ids to logits.
        batches: at least one, see `moe.training.data.eval_batches`; the same in all processes.
        token_bytes: bytes of text of each token id.
        device: where the model is.
        autocast: entered around each forward pass.
    """
    modes = [part.training for part in runner.parts]
    for part in runner.parts:
        part.eval()
        take_evaluation_load(part)  # what was counted before is not this validation's
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_tokens = num_bytes = 0
    for batch in map(runner.share, batches):
        total += runner.summed_loss(batch, autocast)
        num_tokens += batch["targets"].numel()
        num_bytes += target_bytes(batch["targets"], token_bytes)
    loads = {layer: load for part in runner.parts for layer, load in take_evaluation_load(part).items()}
    max_vio = runner.merge({layer: stats.max_vio.item() for layer, stats in loads.items()})
    for part, mode in zip(runner.parts, modes):
        part.train(mode)
    counts = torch.tensor([num_tokens, num_bytes], dtype=torch.float64, device=device)
    loss, tokens, text = runner.total(torch.cat([total[None], counts])).tolist()
    return Evaluation(loss / tokens, loss / math.log(2) / max(text, 1), max_vio, loads)
