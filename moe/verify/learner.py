"""What takes the training steps of a verification: a whole model in one process, or a rank's share of one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.layer import balance_step, moe_layers
from moe.models import Decoder
from moe.monitor import LoadStats
from moe.parallel import ParallelMesh, parallelize
from moe.parallel.gather import Whole, gather
from moe.parallel.norm import local_part
from moe.parallel.parallelize import Parallel
from moe.parallel.pipeline import Pipeline
from moe.verify.factory import Batch, Trial
from moe.verify.options import VerifyOptions

Backward = Callable[[Sequence[Batch], float], float]
"""Micro-batches, all of one data rank, and the weight of their mean loss: adds up gradients and returns that mean."""
Collect = Callable[[Callable[[Tensor], Tensor | None]], Iterable[Whole]]
"""Puts whole parameters together, or something laid out like them; nothing on ranks other than 0."""


@final
@dataclass(frozen=True)
class Learner:
    """A model that learns, however it is spread.

    Attributes:
        parts: the model; of a pipeline, this rank's stages.
        backward: see :data:`Backward`.
        clip: what clips the gradients to a norm, and returns the norm before.
        collect: see :data:`Collect`.
    """

    parts: tuple[nn.Module, ...]
    backward: Backward
    clip: Callable[[float], Tensor]
    collect: Collect

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that this process holds."""
        return (parameter for part in self.parts for parameter in part.parameters())

    def balance_step(self) -> dict[str, LoadStats]:
        """See :func:`moe.balance_step`."""
        return {name: load for part in self.parts for name, load in balance_step(part).items()}

    def score_biases(self) -> dict[str, Tensor | None]:
        """By the name of the layer; every layer that this process has a part of."""
        return {name: layer.router.score_bias for part in self.parts for name, layer in moe_layers(part)}

    def local_norm(self) -> float:
        """Of the gradients that this process holds."""
        parts = [local_part(p.grad).double() for p in self.parameters() if p.grad is not None]
        squares = [part.square().sum() for part in parts]
        return float(torch.stack(squares).sum().sqrt()) if squares else float("nan")


def alone(trial: Trial) -> Learner:
    """The model in this process."""
    named = dict(trial.model.named_parameters())

    def collect(of: Callable[[Tensor], Tensor | None]) -> list[Whole]:
        found = [(name, of(parameter)) for name, parameter in named.items()]
        return [Whole(name, tensor.detach().clone(), 0.0) for name, tensor in found if tensor is not None]

    clip = partial(nn.utils.clip_grad_norm_, list(named.values()))
    return Learner((trial.model,), partial(_one_by_one, trial), clip, collect)


def spread(trial: Trial, mesh: ParallelMesh, options: VerifyOptions) -> Learner:
    """The model over the ranks of a mesh; collective."""
    limits: dict[str, Any] = {"chunks": options.chunks, "max_received_tokens": options.max_received_tokens}
    parallel: Parallel
    if mesh.degrees.pp > 1:
        pipelined = _Pipelined(trial, mesh, options, limits)
        parallel, backward = pipelined.pipeline.parallel, pipelined.backward
    else:
        parallel, backward = parallelize(trial.model, mesh, **limits), partial(_one_by_one, trial)
    if options.compile is not None:
        for part in parallel.parts:
            part.compile(backend=options.compile)
    return Learner(parallel.parts, backward, parallel.clip_grad_norm_, partial(gather, parallel))


def _one_by_one(trial: Trial, batches: Sequence[Batch], weight: float) -> float:
    total = 0.0
    for batch in batches:
        loss = trial.loss_of(trial.model, batch)
        (loss * (weight / len(batches))).backward()
        total += loss.item() / len(batches)
    return total


class _Pipelined:
    """A trial's decoder in stages.

    The last stage computes the trial's loss of what a stand-in for the model returns: the logits that have come through
    the stages. Balance losses are added by the stages themselves; the stand-in has none.
    """

    def __init__(self, trial: Trial, mesh: ParallelMesh, options: VerifyOptions, limits: dict[str, Any]) -> None:
        assert isinstance(trial.model, Decoder)
        self._trial = trial
        self._batches: Sequence[Batch] = ()
        sizes = {"microbatches": options.parts(mesh.degrees), "stages_per_rank": options.stages_per_rank}
        self.pipeline = Pipeline(trial.model, mesh, self._loss, **sizes, **limits)

    def backward(self, batches: Sequence[Batch], weight: float) -> float:
        """See :data:`Backward`."""
        self._batches = batches
        arguments = {key: torch.cat([batch[key] for batch in batches]) for key in _decoder_arguments(batches[0])}
        return self.pipeline.step(targets=torch.arange(len(batches)), scale=weight, **arguments).item()

    def _loss(self, logits: Tensor, number: Tensor) -> Tensor:
        return self._trial.loss_of(_Returns(logits), self._batches[int(number)])


class _Returns(nn.Module):
    """Stands in for a model whose output is there already."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_args: Any, **_options: Any) -> Tensor:
        return self._output


def _decoder_arguments(batch: Batch) -> list[str]:
    """The tensors of a batch that a decoder takes.

    Raises:
        ConfigError: there are no tokens among them.
    """
    if "tokens" not in batch:
        raise ConfigError(
            f"make_batch returned {', '.join(batch)}; under pp > 1 a batch needs 'tokens', which the first stage "
            "gets, and may have 'token_mask'"
        )
    return [key for key in ("tokens", "token_mask") if key in batch]
