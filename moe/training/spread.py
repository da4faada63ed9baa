"""A model over many devices, behind what the training loop asks of one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

from moe.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from moe.errors import ConfigError, MoEError
from moe.models import Decoder
from moe.parallel import Degrees, Parallel, ParallelMesh, parallelize
from moe.parallel.dispatcher import even_bounds
from moe.parallel.state import WholeState, gather_state, load_state, reshard
from moe.parallel.world import World, add_up, merge
from moe.training.config import ParallelOptions
from moe.training.data import Batch
from moe.training.ranks import Ranks
from moe.training.runner import Autocast, OneDevice, Runner, forward_backward, summed_loss
from moe.training.stages import Stages

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
"""From what has ``named_parameters`` to an optimizer over them."""


@runtime_checkable
class Passes(Protocol):
    """How a share of a batch goes through what this process has of the model; see `moe.training.runner.Runner`."""

    def forward_backward(self, batch: Batch, scale: float, autocast: Autocast) -> tuple[Tensor, Tensor]:
        """Add gradients."""
        ...

    def summed_loss(self, batch: Batch, autocast: Autocast) -> Tensor:
        """Add nothing."""
        ...


@final
@dataclass(frozen=True)
class OneStage:
    """A model that every process calls."""

    model: nn.Module

    def forward_backward(self, batch: Batch, scale: float, autocast: Autocast) -> tuple[Tensor, Tensor]:
        """See `moe.training.runner.Runner.forward_backward`."""
        return forward_backward(self.model, batch, scale, autocast)

    def summed_loss(self, batch: Batch, autocast: Autocast) -> Tensor:
        """See `moe.training.runner.Runner.summed_loss`."""
        return summed_loss(self.model, batch, autocast)


@final
class ManyDevices:
    """A model that is spread over the processes of a run. Every method is collective.

    Args:
        ranks: the processes.
        parallel: what this one has of the model.
        passes: how a batch goes through it.
        blank: makes the whole model, as it was before it was spread; called on the meta device.
        make_optimizer: makes the optimizer of a model.
    """

    def __init__(
        self,
        ranks: World,
        parallel: Parallel,
        passes: Passes,
        blank: Callable[[], nn.Module],
        make_optimizer: MakeOptimizer,
    ) -> None:
        self.ranks, self.parallel, self.passes = ranks, parallel, passes
        self._blank, self._make_optimizer = blank, make_optimizer

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The model, or this process's stages of it."""
        return self.parallel.parts

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those in this process."""
        return self.parallel.named_parameters()

    def share(self, batch: Batch) -> Batch:
        """Consecutive sequences, as evenly as they go; the same in processes that share tokens or are one pipeline."""
        mesh = self.parallel.mesh
        bounds = even_bounds(len(batch["inputs"]), mesh.degrees.dp)
        own = slice(bounds[mesh.data_rank], bounds[mesh.data_rank + 1])
        return {"inputs": batch["inputs"][own], "targets": batch["targets"][own]}

    def forward_backward(self, batch: Batch, scale: float, autocast: Autocast) -> tuple[Tensor, Tensor]:
        """See `moe.training.runner.Runner.forward_backward`."""
        return self.passes.forward_backward(batch, scale, autocast)

    def summed_loss(self, batch: Batch, autocast: Autocast) -> Tensor:
        """See `moe.training.runner.Runner.summed_loss`."""
        return self.passes.summed_loss(batch, autocast)

    def clip(self, max_norm: float) -> Tensor:
        """See `moe.training.runner.Runner.clip`."""
        return self.parallel.clip_grad_norm_(max_norm)

    def total(self, values: Tensor) -> Tensor:
        """The sum over data ranks."""
        return add_up(values, self.parallel.mesh.data)

    def merge(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What all stages know."""
        mesh = self.parallel.mesh
        return merge(values, mesh.group("pp")) if mesh.degrees.pp > 1 else dict(values)

    def save(
        self, store: CheckpointStore, step: int, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> None:
        """The first process puts the whole model together and writes it; see `moe.training.runner.Runner.save`."""
        whole = gather_state(self.parallel, optimizer)
        rate = optimizer.param_groups[0]["lr"]
        self.ranks.first(lambda: store.save(step, *self._assemble(whole, rate), state))

    def newest(self, store: CheckpointStore) -> Checkpoint | None:
        """The newest one that the first process finds good."""

        def find() -> Any:
            found = store.latest()
            return None if found is None else found.path

        path = self.ranks.first(find)
        if path is None:
            return None
        with self.ranks.together():
            return read_checkpoint(path, files=())

    def load(self, store: CheckpointStore, checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> Mapping:
        """Every process reads the whole file and keeps its part; see `moe.training.runner.Runner.load`."""
        with self.ranks.together():
            with torch.device("meta"):
                model = self._blank()
            model.to_empty(device="cpu")
            copy = self._make_optimizer(model)
            state = store.load(checkpoint, model, copy)
            moments = {name: copy.state[parameter] for name, parameter in model.named_parameters()}
            whole = WholeState(model.state_dict(), {name: kept for name, kept in moments.items() if kept})
        load_state(self.parallel, optimizer, whole)
        return state

    def _assemble(self, whole: WholeState | None, rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A model and an optimizer as one process would have them, around tensors that are there already."""
        assert whole is not None
        with torch.device("meta"):
            model = self._blank()
        model.load_state_dict(whole.tensors, assign=True)
        optimizer = self._make_optimizer(model)
        for name, parameter in model.named_parameters():
            if name in whole.optimizer:
                optimizer.state[parameter] = dict(whole.optimizer[name])
        for group in optimizer.param_groups:
            group["lr"] = rate
        return model, optimizer


def check_split(options: ParallelOptions, batch_size: int, ranks: Ranks) -> Degrees:
    """The degrees of a run, which its batch can be divided by.

    Raises:
        ConfigError: they do not multiply to the number of processes, or the batch does not split.
    """
    if not isinstance(ranks, World):
        degrees = Degrees.parse(options.axes)
        if degrees.world_size > 1:
            raise ConfigError(
                f"parallel: {degrees} needs {degrees.world_size} processes and this is one; start them with "
                f"torchrun --nproc-per-node {degrees.world_size}"
            )
        return degrees
    degrees = Degrees.parse(options.axes, ranks.size)
    parts = degrees.dp * options.num_microbatches
    if batch_size % parts:
        pipeline = f" * microbatches={options.num_microbatches}" if degrees.pp > 1 else ""
        raise ConfigError(
            f"batch_size={batch_size} is no multiple of dp_replicate={degrees.dp_replicate} * "
            f"dp_shard={degrees.dp_shard}{pipeline} = {parts}"
        )
    return degrees


def spread(
    model: Decoder,
    degrees: Degrees,
    options: ParallelOptions,
    ranks: Ranks,
    blank: Callable[[], nn.Module],
    make_optimizer: MakeOptimizer,
) -> Runner:
    """Spread a model over the processes of a run, in place.

    Args:
        model: whole, on this process's device, the same everywhere.
        degrees: from :func:`check_split`.
        options: likewise.
        ranks: the processes; where there is one the model stays as it is.
        blank: makes the model again, for checkpoints.
        make_optimizer: of a model.

    Raises:
        ConfigError: on every rank: the model cannot be divided so.
    """
    if not isinstance(ranks, World):
        return OneDevice(model)
    mesh = ParallelMesh(degrees, next(model.parameters()).device.type, node_size=options.node_size)
    ranks.limit_groups()
    how: dict[str, Any] = {"chunks": options.chunks, "max_received_tokens": options.max_received_tokens}
    if degrees.pp == 1:
        parallel = parallelize(model, mesh, **how)
        return ManyDevices(ranks, parallel, OneStage(model), blank, make_optimizer)
    stages = Stages(model, mesh, options.num_microbatches, options.stages_per_rank, how)
    return ManyDevices(ranks, stages.pipeline.parallel, stages, blank, make_optimizer)


def sample_together(runner: Runner, write: Callable[[Decoder], str]) -> str:
    """Have the processes sample from a model together.

    Args:
        runner: has the model.
        write: samples a text; in every process it calls the model equally often.

    Returns:
        The text, the same in all processes; or in brackets why there is none.
    """
    (model, *_) = runner.parts
    if not isinstance(model, Decoder):
        return "[no sample: a model in pipeline stages cannot generate]"
    if not isinstance(runner, ManyDevices):
        return _sample_or_reason(model, write)

    def same(_module: nn.Module, _args: Any, logits: Tensor) -> Tensor:
        return runner.ranks.same(logits.contiguous())  # rounding may differ, and with it the length of the text

    hook = model.register_forward_hook(same)
    try:
        return _sample_or_reason(model, write)
    finally:
        hook.remove()
        reshard(runner.parallel)


def _sample_or_reason(model: Decoder, write: Callable[[Decoder], str]) -> str:
    """A text; of a model that cannot generate, as with a router that looks at later tokens, why there is none."""
    try:
        return write(model)
    except MoEError as error:
        return f"[no sample: {error}]"
