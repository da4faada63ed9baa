"""One function that spreads a model over ranks, and the handle that it returns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ParallelStyle

from moe.dispatch import Dispatcher
from moe.layer import MoE, moe_layers
from moe.parallel.consistency import require_same_everywhere
from moe.parallel.data_parallel import outermost_blocks, shard_data_parallel
from moe.parallel.dispatcher import ExpertParallel, even_bounds
from moe.parallel.experts import Shard, shard_experts
from moe.parallel.hierarchical import Hierarchical
from moe.parallel.loads import PoolCounts
from moe.parallel.mesh import ParallelMesh
from moe.parallel.norm import clip, copies_of, total_norm
from moe.parallel.replicas import SharedTokens
from moe.parallel.tensor_parallel import divide_dense


@final
@dataclass(frozen=True)
class Parallel:
    """A model that is spread over ranks.

    Attributes:
        parts: the model as it was given, changed in place; of a pipeline, the stages of this rank.
        mesh: where this rank stands.
        shards: the part of each parameter that this rank holds, before data parallelism divides it; by its name.
    """

    parts: tuple[nn.Module, ...]
    mesh: ParallelMesh
    shards: Mapping[str, Shard]

    @classmethod
    def merge(cls, stages: Sequence["Parallel"]) -> "Parallel":
        """Several stages of one model on the same mesh as one."""
        shards = {name: shard for stage in stages for name, shard in stage.shards.items()}
        return cls(tuple(part for stage in stages for part in stage.parts), stages[0].mesh, shards)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's, by the names that they have in the whole model."""
        return (named for part in self.parts for named in part.named_parameters())

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that the norm over all ranks is at most ``max_norm``.

        What ``torch.nn.utils.clip_grad_norm_`` does to a model on one device, over all meshes at once. Every rank calls
        it. It changes the gradients that any optimizer will read, a foreach or fused one too.

        Returns:
            The norm before, a scalar; the same bits on every rank.
        """
        named = [(name, p) for name, p in self.named_parameters() if p.grad is not None]
        norm = total_norm(((p.grad, self._copies(name, p)) for name, p in named if p.grad is not None), norm_type)
        clip((p for _, p in named), norm, max_norm)
        return norm

    def _copies(self, name: str, parameter: Tensor) -> int:
        sizes = {**self.mesh.degrees.dense_shape, **self.mesh.degrees.expert_shape}
        ranks = self.mesh.degrees.world_size // self.mesh.degrees.pp
        for axis in self.shards[name].axes:
            ranks //= sizes[axis]
        return copies_of(parameter, ranks)


def parallelize(
    model: nn.Module,
    mesh: ParallelMesh,
    *,
    blocks: Sequence[nn.Module] | None = None,
    chunks: int = 1,
    max_received_tokens: int | None = None,
    mixed_precision: MixedPrecisionPolicy | None = None,
    tp_plan: Mapping[str, ParallelStyle] | None = None,
) -> Parallel:
    """Spread a model over the ranks of a mesh, in place.

    Experts are cut down to those of this rank and the layers get a dispatcher that reaches the others; counts for
    balance are summed over data ranks; FSDP2 shards the rest. The model's own code stays as it is. Its loss must be a
    mean over the tokens of its rank; gradients are then those of the mean over data ranks.

    Args:
        model: whole, and the same on all ranks (the same seed, or the same checkpoint).
        mesh: made by every rank with the same degrees.
        blocks: modules that FSDP2 gathers and frees as one; None for the members of ``nn.ModuleList``
            and ``nn.ModuleDict``.
        chunks: parts in which tokens travel; with more than one, communication and computation overlap.
        max_received_tokens: of a layer on one rank at a time; see :class:`moe.parallel.dispatcher.ExpertParallel`.
        mixed_precision: FSDP2's policy; None computes in the parameters' dtype.
        tp_plan: how the ``tp`` axis divides a user's own dense modules, by their names; the same on every rank without.
            Blocks of :class:`moe.models.Decoder` and MoE layers need none. See
            :func:`moe.parallel.tensor_parallel.divide_dense`.

    Raises:
        ConfigError: on every rank: ranks disagree on the model or the options, or the model cannot be divided so.
    """
    styles = {name: type(style).__name__ for name, style in (tp_plan or {}).items()}
    options = f"chunks={chunks}, max_received_tokens={max_received_tokens}, tp_plan={styles}"
    require_same_everywhere({"degrees": str(mesh.degrees), "options": options, **describe(model)}, mesh.stage)
    divided = divide_dense(model, mesh, tp_plan)
    shards = {name: divided.get(name) or Shard.whole(parameter) for name, parameter in model.named_parameters()}
    layers = dict(moe_layers(model))
    pool = PoolCounts(mesh.data) if mesh.degrees.dp > 1 else None
    experts: list[nn.Parameter] = []
    for name, layer in layers.items():
        prefix = f"{name}.experts." if name else "experts."
        cut = shard_experts(layer.experts, mesh)
        shards = {key: shard for key, shard in shards.items() if not key.startswith(prefix)}
        shards |= {prefix + key: shard for key, shard in cut.items()}
        experts += list(layer.experts.parameters())
        layer.dispatcher = make_dispatcher(layer, mesh, chunks, max_received_tokens)
        layer.pool_counts = pool
    found = outermost_blocks(model) if blocks is None else blocks
    shard_data_parallel(model, experts, mesh, found, mixed_precision or MixedPrecisionPolicy())
    return Parallel((model,), mesh, shards)


def make_dispatcher(layer: MoE, mesh: ParallelMesh, chunks: int, max_received_tokens: int | None) -> Dispatcher:
    """What brings a layer's tokens to its experts and back."""
    degrees = mesh.degrees
    flat = ExpertParallel(
        mesh.exchange,
        even_bounds(layer.num_experts, degrees.ep),
        copies=degrees.etp,
        # A rank's experts get the gradients of all tokens sent to them, and their mean over edp ranks is taken: of dp
        # data ranks' losses that is the sum over edp, where the mean over dp is due.
        gradient_scale=degrees.edp / degrees.dp,
        chunks=chunks,
        max_received_tokens=max_received_tokens,
    )
    dispatcher: Dispatcher = Hierarchical.split(flat, *mesh.nodes) if mesh.nodes else flat
    return SharedTokens(dispatcher, mesh.group("tp")) if degrees.tp > 1 else dispatcher


def describe(model: nn.Module) -> dict[str, str]:
    """What must be the same on all ranks: the modules with their options, and each parameter with its values."""
    parameters = {f"parameter {name}": _fingerprint(parameter) for name, parameter in model.named_parameters()}
    return {"model": repr(model), **parameters}


def _fingerprint(parameter: nn.Parameter) -> str:
    """Shape, dtype, whether it learns, and the sum of its bits as integers, which no order of summation changes."""
    values = parameter.detach()
    as_integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = "no values" if values.is_meta else values.contiguous().view(as_integers).sum(dtype=torch.int64).item()
    return f"{tuple(values.shape)} {values.dtype} {parameter.requires_grad} {bits}"
